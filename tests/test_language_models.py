"""Language models side by side: what is run, what is kept of it, and when one reaches what another had."""

import importlib
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from training.cli import parse

ROOT = pathlib.Path(__file__).parents[1]
NAMES = ("language_runs", "language_results", "language_tables", "plot_language")
MODEL = {"layers": 1, "width": 16, "heads": 1, "dtype": "float32"}
SIZES = {"batch.length": 64, "batch.size": 2, "evaluation.windows": 2, "evaluation.final-windows": 2}
OPTIONS = {"steps": 2, "log-every": 1, "evaluation.every": 1} | SIZES | {f"model.{k}": v for k, v in MODEL.items()}
TEXT = "a text to learn by heart, line after line\n" * 400
TINY = [word for name, value in OPTIONS.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def modules(benchmark_module):
    return {name: benchmark_module(name) for name in NAMES}


def test_settings_are_those_of_the_kind(modules):
    runs = modules["language_runs"]
    for name, kind in runs.KINDS.items():
        run = runs.Run("enwik8", 8192, 100, name, 3)
        config = parse(run.settings())
        assert config.model.shared_qk == kind.shared
        assert config.batch.accumulation * config.batch.size * config.batch.length == run.tokens_of_step == 32_768
        assert (config.steps, config.seed, config.model.layers) == (100, 3, 12)
        assert (ROOT / kind.script).exists()
    everything = runs.chosen([*runs.GROUPS], ["*"])
    assert len({str(run) for run in everything}) == len(everything)
    shapes = {(run.text, run.length): run for run in everything}  # one of each
    for run in shapes.values():
        assert parse(run.settings()).batch.length == run.length


def _run(folder, *more, commit="first", status=0):
    text = folder / "text.txt"
    text.write_text(TEXT)
    command = [sys.executable, str(ROOT / "benchmarks" / "language_models.py"), "choices"]
    command += ["--only", "enwik8-8k-1000-hash16-fixed-seed0", "--runs", folder / "runs", "--out", folder / "out"]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "GIT_COMMIT": commit}
    command = [*map(str, command), "--", "--data", str(text), *TINY, *more]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    return done.stdout


def test_a_run_is_tried_again_and_kept_and_not_run_again(modules, tmp_path):
    said = _run(tmp_path, "--model.buckets", "7", status=1)
    assert "failed: status 2, train.py: --model.buckets must be even" in said
    folder = tmp_path / "runs" / "enwik8-8k-1000-hash16-fixed-seed0"
    folder.mkdir()
    (folder / "metrics.jsonl").touch()  # ended before its first checkpoint
    assert "reason done" in _run(tmp_path)
    (path,) = (tmp_path / "out").iterdir()
    first, *records = map(json.loads, path.read_text().splitlines())
    assert first["kind"] == "run"
    assert first["environment"]["command"].startswith("python benchmarks/language_models.py choices")
    assert [record["kind"] for record in records] == ["train", "evaluation", "train", "final", "end"]
    assert "was done" in _run(tmp_path, commit="second")
    ((run, curve),) = modules["language_results"].load_curves(tmp_path / "out").items()
    assert str(run) == path.stem == "enwik8-8k-1000-hash16-fixed-seed0"
    assert curve.environment["commit"] == "first"
    assert curve.final["loss"] == records[-2]["loss"]
    assert curve.held_out == {1: records[1]["loss"]}
    assert curve.visible.shape == (2, 1)

    metrics = folder / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records[:-1]))  # as if it had been killed
    assert "begun on 1 x cpu, first, " in _run(tmp_path, commit="second", status=1)


def _write(folder, modules, attention, seconds, held_out, length=8192, steps=1000, seed=0):
    """The metrics of a run that was stopped in its third record, and went on."""
    run = modules["language_runs"].Run("enwik8", length, steps, attention, seed)
    times = [1 * seconds, 2 * seconds, 0.5 * seconds, 1.5 * seconds]
    environment = {"device": "2 x a GPU", "jax": "0.0", "commit": "0123456789", "command": "python benchmarks/x.py"}
    records = [{"kind": "run", "step": 0, **run._asdict(), "environment": environment}]
    for step, (time, loss) in enumerate(zip(times, held_out, strict=True), 1):
        values = {"loss": loss, "training_seconds": time, "visible": [0.5, 0.25]}
        records.append({"kind": "train", "step": 100 * step, **values})
        records.append({"kind": "evaluation", "step": 100 * step, "loss": loss})
    records.append({"kind": "final", "step": 400, "loss": held_out[-1], "bits_per_byte": held_out[-1]})
    records.append({"kind": "end", "step": 400, "reason": "done", "peak_bytes": 2**30})
    (folder / f"{run}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return run


def test_sooner(modules, tmp_path):
    slow = _write(tmp_path, modules, "dense-own-keys", 10.0, [4.0, 3.0, 2.5, 2.0])
    fast = _write(tmp_path, modules, "local-dense-own-keys", 2.0, [3.0, 2.5, 1.5, 1.0])
    results = modules["language_results"]
    curves = results.load_curves(tmp_path)
    assert list(curves[slow].seconds) == [10, 20, 25, 35]  # what came before the stop is added
    assert results.sooner(curves[slow], curves[fast]) == (2.0, 35.0, 4.5)  # half way from step 200 to 300
    assert results.sooner(curves[fast], curves[slow]) == (1.0, 7.0, None)
    assert curves[slow].tokens_per_second() == 100 * 32_768 / 10
    assert curves[slow].environment["device"] == "1 x a GPU"


def test_figures_and_tables(modules, tmp_path):
    for length in (8192, 16_384):
        for attention in ("dense-own-keys", "local-dense-own-keys", "hash16"):
            _write(tmp_path, modules, attention, 5.0, [3.0, 2.5, 1.5, 1.0], length)
    for attention, seconds in (("dense-own-keys", 5.0), ("local-dense-own-keys", 2.0)):
        _write(tmp_path, modules, attention, seconds, [3.0, 2.5, 1.5, 1.0], 16_384, 3000)
    drawn = modules["plot_language"].draw_language(tmp_path, tmp_path)
    assert {"language-models.png", "language-longer.png"} <= {path.name for path in drawn}
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG")
    tables = modules["language_tables"].language_tables(tmp_path)
    assert tables["longer"].count("| 16384 | 0 |") == tables["longer"].count("2.5x |") == 1
    assert "| 16 buckets | shared | 1.000 | 1.000 | 655 k | 1.00x | 0.375 | 1.0 GiB |" in tables["language-models"]
    assert tables["sooner"].count("1.0x |") == 2
    same = "| window of 128, every fourth layer dense | 1.000 | 655 k | 0.375 | 1.0 GiB | 1.0x sooner |"
    assert tables["seeds"].count(same) == 2
    _write(tmp_path, modules, "qk50", 5.0, [3.0, 2.5, 1.5, 1.0])
    tables = modules["language_tables"].language_tables(tmp_path)
    assert (
        "| layers | enwik8, 8k tokens: loss, nats a byte | enwik8, 8k tokens: tokens/s | enwik8, 16k" in tables["paper"]
    )
    assert (
        "| 16 buckets | 1.000 | 655 k | 1.000 | 655 k |\n| 50 % of q and k dropped | 1.000 | 655 k | - | - |"
        in tables["paper"]
    )
    assert "paper-training" not in tables  # without a dense model that has shared keys
    _write(tmp_path, modules, "dense", 10.0, [3.0, 2.5, 1.5, 0.5])
    tables = modules["language_tables"].language_tables(tmp_path)
    assert "| 50 % of q and k dropped | 8192 | 2.6x | 2.00x | +0.500 |" in tables["paper-training"]


def test_seeds_from_least_to_most(modules, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    for length in (16_384, 8192):
        for seed, (seconds, last) in enumerate([(2.0, 1.5), (1.0, 2.2)]):
            _write(tmp_path, modules, "dense-own-keys", 10.0, [4.0, 3.0, 2.5, 2.0], length, seed=seed)
            _write(tmp_path, modules, "local-dense-own-keys", seconds, [3.0, 2.5, 1.5, last], length, seed=seed)
            _write(tmp_path, modules, "local-qk50-own-keys", seconds, [3.0, 2.5, last, last], length, seed=seed)
            _write(
                tmp_path, modules, "hash16-near-rotated-fixed-own-keys", 1.0, [4.0, 3.5, 3.0, 2.5], length, seed=seed
            )
    tables = modules["language_tables"].language_tables(tmp_path)
    kinds = ["dense, cuDNN", "window of 128, every fourth layer dense"]
    kinds += ["window of 128, every fourth layer 50 % dropped"]
    kinds += ["16 buckets, after rotary positions, and the last 128 tokens, fixed hashes"]
    measured = ["2.000 | 328 k |", "1.500 to 2.200 | 1638 to 3277 k |", "1.500 to 2.200 | 1638 to 3277 k |"]
    measured += ["2.500 | 3277 k |"]
    sooner = ["", "7.8 to 15.6x sooner", "7.8x sooner, 1 of 2 seeds", "0 of 2 seeds"]
    rows = zip(kinds, measured, sooner, strict=True)
    expected = [f"{kind} | {values} 0.375 | 1.0 GiB | {at} |" for kind, values, at in rows]
    expected = [f"| {length} | {row}" for length in (8192, 16_384) for row in expected]
    assert tables["seeds"].splitlines()[2:-2] == expected
    lengths = [row.split(" | ")[1] for row in tables["sparse"].splitlines()[2:-2]]
    assert lengths == 2 * ["8192", "8192", "16384", "16384"]
    assert tables["sparse"].count("| 2.000 | 35 s | - | - |") == 6
    drawn = []
    monkeypatch.setattr(modules["plot_language"], "finish_figure", lambda figure, *_: drawn.append(figure))
    modules["plot_language"].draw_language(tmp_path, tmp_path)
    assert [text.get_text() for text in drawn[0].axes[0].texts][1:] == sooner[1:]


def test_what_was_not_measured_is_left_out(modules, tmp_path):
    pytest.importorskip("matplotlib")
    draw, tables = modules["plot_language"].draw_language, modules["language_tables"].language_tables
    assert (draw(tmp_path, tmp_path), tables(tmp_path)) == ([], {})

    _write(tmp_path, modules, "qk50", 5.0, [3.0, 2.5, 1.5, 1.0])  # no dense model, and none that hashes
    drawn = [path.name for path in draw(tmp_path, tmp_path)]
    assert drawn == ["language-paper.png", "language-choices.png"]
    made = tables(tmp_path)
    assert made.keys() == {"paper", "language-models"}
    assert "| 50 % of q and k dropped | shared | 1.000 | 1.000 | 655 k | - | 0.375 |" in made["language-models"]


def test_figures_and_tables_name_all_devices_and_commits(modules, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    for attention in ("dense-own-keys", "local-dense-own-keys"):
        run = _write(tmp_path, modules, attention, 5.0, [3.0, 2.5, 1.5, 1.0], 16_384)  # a length without `choices`
    path = tmp_path / f"{run}.jsonl"
    elsewhere = path.read_text().replace("0123456789", "abcdefghij").replace("2 x a GPU", "2 x NVIDIA H100 80GB HBM3")
    path.write_text(elsewhere)
    drawn = []
    monkeypatch.setattr(modules["plot_language"], "finish_figure", lambda figure, *_: drawn.append(figure))
    assert [path.name for path in modules["plot_language"].draw_language(tmp_path, tmp_path)] == ["language-models.png"]
    (named,) = drawn[0].legends
    both = "a GPU and NVIDIA H100 80GB HBM3, jax 0.0, commits 0123456, abcdefg"
    assert named.get_title().get_text() == both
    made = modules["language_tables"].language_tables(tmp_path)
    assert made.keys() == {"sooner", "seeds"}
    assert "| 655 k | 655 k (H100) |" in made["sooner"]
    assert "every fourth layer dense | 1.000 | 655 k (H100) |" in made["seeds"]
    assert made["sooner"].endswith(f"language_models.py headline` on {both}; data: `results/language-models`.")


def test_losses_over_draws(benchmark_module, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    train, draws = importlib.import_module("train"), benchmark_module("evaluation_draws")
    for kind, more in {"hash": ["--model.buckets", "8"], "dense": []}.items():
        settings = ["--data", str(text), "--attention", kind, *more, *TINY, "--sample.tokens", "0"]
        with jax.numpy_dtype_promotion("standard"):  # which optax needs
            assert train.main([*settings, "--out", str(tmp_path / kind)]) == 0
    out = tmp_path / "draws.json"
    options = ["--draws", "3", "--windows", "2", "--out", str(out)]

    def run(*names):
        monkeypatch.setattr(sys, "argv", ["evaluation_draws.py", *(str(tmp_path / name) for name in names), *options])
        draws.main()

    with pytest.raises(SystemExit, match="no run in"):
        run("hash", "none")
    assert not out.exists()
    run("hash", "dense")
    hashed, dense = json.loads(out.read_text())["runs"]
    assert (hashed["run"], hashed["attention"], hashed["buckets"]) == ("hash", ["hash"], 8)
    assert len({hashed["own"], *hashed["others"]}) == 4  # each draw has other buckets
    assert {dense["own"]} == {*dense["others"]}
    records = map(json.loads, (tmp_path / "hash" / "metrics.jsonl").read_text().splitlines())
    (final,) = (record["loss"] for record in records if record["kind"] == "final")
    assert hashed["own"] == pytest.approx(final, rel=1e-6)
