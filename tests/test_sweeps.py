"""The run-time sweeps: what they measure, resumed runs, and figures and tables of what is there."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import definition

ROOT = pathlib.Path(__file__).parents[1]
PARTS = {"forward", "backward", "forward_backward"}
ENVIRONMENT = {"device": "1 x a GPU", "jax": "0.0", "commit": "0123456789", "command": "python benchmarks/sweeps.py"}
NAMES = ("sweep_cases", "sweep_calls", "sweep_results", "sweep_tables", "plot_sweeps")


@pytest.fixture(scope="module")
def sweeps(benchmark_module):
    return {name: benchmark_module(name) for name in NAMES}


def _case(sweeps, method, pattern, length=64, heads=1):
    return sweeps["sweep_cases"].SweepCase(method, pattern, 1, length, heads, 16, "float32")


def _run(*args):
    command = [sys.executable, str(ROOT / "benchmarks" / "sweeps.py"), "--quick", "--heads", "1", *map(str, args)]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_resumed_run_measures_what_failed_and_keeps_the_others(tmp_path):
    out = tmp_path / "sweeps.json"
    choice = ("--methods", "dense", "sparse", "--patterns", "qk50", "--out", out)
    _run(*choice, "--implementation", "triton")
    dense, sparse = json.loads(out.read_text())["cases"]
    assert (dense["method"], dense["failed"], dense["seconds"].keys()) == ("dense", {}, PARTS)
    assert (sparse["method"], sparse["seconds"]) == ("sparse", {})
    assert "needs an NVIDIA GPU" in sparse["failed"]["all"]

    said = _run(*choice, "--resume", "--processes", 2, "--draw", tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {"sweeps-hash.png", "sweeps-qk.png", "sweeps-paper.png"}
    result = json.loads(out.read_text())
    assert result["environment"]["platform"] == "cpu"
    assert result["flex_attention"] == "not run: no GPU"
    assert result["cases"][0] == dense
    assert "dense" not in said
    (sparse,) = result["cases"][1:]
    assert (sparse["method"], sparse["case"], sparse["failed"]) == ("sparse", "B1-T64-N1-H16-qk50-f32", {})
    assert sparse["seconds"].keys() == PARTS
    assert all(timing["median"] > 0 for timing in sparse["seconds"].values())
    assert sparse["case"] in said


def test_parts_agree(sweeps):
    calls = sweeps["sweep_calls"]
    programs = calls.compiled(_case(sweeps, "sparse", "qk50"), "xla", "xla")
    q, k, v, do = programs.draw(jax.random.key(0))
    arrays = jax.tree.map(jnp.asarray, programs.arrays)
    o, pull_back = programs.residuals(arrays, q, k, v)
    both = programs.forward_backward(arrays, q, k, v, do)
    for part, whole in zip((o, *programs.backward(pull_back, do)), both, strict=True):
        np.testing.assert_allclose(part, whole, atol=1e-5)
    np.testing.assert_allclose(programs.forward(arrays, q, k, v), o, atol=1e-5)

    mask = calls.visible(arrays)
    naive = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla")
    seen = jnp.swapaxes(mask.any(axis=3), 1, 2)[..., None]
    np.testing.assert_allclose(jnp.where(seen, naive, 0), o, atol=1e-5)


@pytest.mark.parametrize("pattern", ["hash4", "qk50"])
def test_masks_are_those_of_the_definition(sweeps, pattern):
    case = _case(sweeps, "sparse", pattern, heads=2).case
    arrays = jax.tree.map(jnp.asarray, case.arrays())
    np.testing.assert_array_equal(sweeps["sweep_calls"].visible(arrays), definition.visible(case))


def test_naive_is_compiled_for_its_mask(sweeps):
    calls = sweeps["sweep_calls"]
    record = calls.timed(calls.compiled(_case(sweeps, "naive", "hash16"), None, "xla"), samples=1)
    assert record["failed"] == {}
    assert record["seconds"].keys() == PARTS


def test_every_case_is_of_one_process_and_the_largest_come_last(sweeps):
    of = sweeps["sweep_cases"]
    sizes = {"batch": 4, "head_dim": 64, "dtype": "bfloat16"}
    cases = of.sweep_cases(of.LENGTHS, of.HEADS, of.METHODS, None, of.FLEX_LENGTHS, **sizes)
    assert len(set(cases)) == len(cases)
    # Dense, 6 + 7 of ours, 2 x 2 masked; 3 of FlexAttention at 4 lengths.
    assert len(cases) == 7 * 2 * (1 + 13 + 4) + 3 * 4
    left_out = [case for case in cases if case.left_out]
    assert {case.method for case in left_out} == {"naive", "naive_cudnn"}
    assert all("T x T" in case.left_out for case in left_out)
    measured = [case for case in cases if not case.left_out]
    shares = of.shares(measured, 14)
    assert len(shares) == 14
    assert sorted(case for share in shares for case in share) == sorted(measured)
    assert max(map(len, shares)) <= 1.25 * min(map(len, shares))
    most = [max(case.peak_bytes for case in share) for share in shares]
    assert most == sorted(most)
    for share in shares:
        assert share[0].peak_bytes == max(case.peak_bytes for case in share)


def test_rows_of_another_commit_are_not_gone_on_with(sweeps, tmp_path):
    path = tmp_path / "sweeps.json"
    before = sweeps["sweep_results"].measured_before
    assert before(path, ENVIRONMENT) == ({}, [])
    whole, failed = ({"failed": failed} for failed in ({}, {"backward": "RESOURCE_EXHAUSTED"}))
    path.write_text(json.dumps({"environment": ENVIRONMENT, "cases": [whole, failed]}))
    assert before(path, ENVIRONMENT) == (ENVIRONMENT, [whole])
    with pytest.raises(ValueError, match=r"one commit: .* has 0123456789, this is abc"):
        before(path, ENVIRONMENT | {"commit": "abc"})


def _results(sweeps, path, *, longest):
    """Writes rows whose times follow from their size alone."""
    of, density = sweeps["sweep_cases"], sweeps["sweep_results"].density
    rows = []
    for length in (1024, longest):
        for method, patterns in (("dense", ("causal",)), ("sparse", of.HASHED + of.QK), ("flex", of.FLEX)):
            for pattern in patterns:
                case = _case(sweeps, method, pattern, length, 48)
                ms = length / 1024 * (1 if method == "dense" else 2 * density(pattern))
                seconds = {part: {"median": ms / 1e3} for part in PARTS}
                rows.append({"case": str(case.case), **case._asdict(), "seconds": seconds, "failed": {}})
    rows.append({**_case(sweeps, "naive", "hash16")._asdict(), "seconds": {}, "failed": {}, "left_out": "too large"})
    path.write_text(json.dumps({"environment": ENVIRONMENT, "cases": rows}))


def test_tables_have_speedups_and_the_papers_points(sweeps, tmp_path):
    path = tmp_path / "sweeps.json"
    tables = sweeps["sweep_tables"].sweep_tables
    assert tables(path) == {}
    _results(sweeps, path, longest=32_768)
    made = tables(path)
    lines = made["sweeps"].splitlines()
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| 1024", "| 32768"]
    assert lines[3].startswith("| 32768 | 32.00 ms | 1.0x | 2.0x | 4.0x | 8.0x | 16.0x | 32.0x | 0.8x |")
    assert "| 16 buckets | 4.0 | 8.0x | 373 | 2.7x |" in made["sweeps-paper"]
    assert "| 80 % of q and k dropped | 2.6 | 12.5x | 84 | 12x |" in made["sweeps-paper"]

    _results(sweeps, path, longest=4096)  # without the paper's length
    assert "| 16 buckets | - | - | 373 | 2.7x |" in tables(path)["sweeps-paper"]


@pytest.mark.parametrize("longest", [4096, 32_768])
def test_figures_are_drawn_of_what_is_there(sweeps, tmp_path, longest):
    pytest.importorskip("matplotlib")
    path = tmp_path / "sweeps.json"
    _results(sweeps, path, longest=longest)
    pictures = sweeps["plot_sweeps"].draw_sweeps(path, tmp_path)
    assert len(pictures) == 3
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


def test_lines_break_where_a_point_is_missing(sweeps, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    path = tmp_path / "sweeps.json"
    _results(sweeps, path, longest=32_768)
    result = json.loads(path.read_text())
    lacking = [row for row in result["cases"] if (row["pattern"], row["length"]) != ("hash8", 32_768)]
    path.write_text(json.dumps(result | {"cases": [*lacking, result["cases"][0] | {"length": 2048}]}))  # dense alone
    drawn = []
    monkeypatch.setattr(sweeps["plot_sweeps"], "finish_figure", lambda figure, *_: drawn.append(figure))
    sweeps["plot_sweeps"].draw_sweeps(path, tmp_path)

    lines = {line.get_label(): line.get_xydata().tolist() for line in drawn[0].axes[0].get_lines()}
    assert lines["cuDNN dense causal"] == [[1024, 1], [2048, 1], [32_768, 32]]
    np.testing.assert_array_equal(lines["16 buckets"], [[1024, 1 / 8], [2048, np.nan], [32_768, 4]])
    assert lines["8 buckets"] == [[1024, 1 / 4]]
    assert lines["FlexAttention, 16 buckets, sorted before"] == [[1024, 1 / 8], [32_768, 4]]  # few lengths by choice
    paper = drawn[2].axes[0]
    np.testing.assert_allclose(paper.get_lines()[1].get_ydata(), [1, 2, np.nan, 8, 16, 32])
    assert not any("nan" in text.get_text() for text in paper.texts)


def test_nothing_measured_is_nothing_shown(sweeps, tmp_path):
    path = tmp_path / "sweeps.json"
    path.write_text(json.dumps({"environment": ENVIRONMENT, "cases": []}))
    assert sweeps["sweep_tables"].sweep_tables(path) == {}
    assert sweeps["plot_sweeps"].draw_sweeps(path, tmp_path) == []
