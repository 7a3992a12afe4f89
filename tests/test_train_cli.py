"""train.py as a user runs it: help, errors, a whole run, signals, and resuming after a kill, bit for bit."""

import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import train
from sparse_flash_jax import time_share
from sparse_flash_jax.flax.pattern import QK, BlockTopK, Dense, Hash, Window
from training import check, run_folder
from training.checkpoint import Checkpoints
from training.cli import parse
from training.config import BatchConfig, TrainConfig, identity
from training.errors import CheckpointError, ConfigError
from training.metrics import MetricsLog, read_metrics
from training.model import transformer_config
from training.presets import PRESETS
from training.run_folder import choose_folder, steps_in
from training.saved_config import read_config, write_config
from training.step import TrainState
from training.throughput import Throughput
from training.trained import load_trained

ROOT = pathlib.Path(__file__).parents[1]
TINY = [
    *("--model.layers", "1", "--model.width", "16", "--model.heads", "2", "--buckets", "4", "--attention", "hash"),
    *("--length", "64", "--sample.tokens", "0", "--log-every", "1"),
    *("--evaluation.every", "0", "--evaluation.windows", "2", "--evaluation.final-windows", "2"),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"line {number}: the same words again\n" for number in range(2000)))
    return str(path)


def arguments(text, out, *more):
    return [*TINY, "--data", text, "--out", str(out), *more]


def run(*options, program=("train.py",), **variables):
    # One device: a virtual CPU of eight would only slow this down.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | variables
    command = [sys.executable, *program, *options]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=-1, stderr=-1, text=True)


def wait_for(condition, process, seconds=300.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def checkpoint_arrays(path):
    with ocp.StandardCheckpointer() as reader:
        return jax.tree.map(np.asarray, reader.restore((path / "state").resolve()))


def losses(out):
    return [
        (record["step"], record["loss"]) for record in read_metrics(out / "metrics.jsonl") if record["kind"] == "train"
    ]


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """A whole small run, in this process."""
    out = tmp_path_factory.mktemp("finished") / "run"
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        status = train.main(
            arguments(
                text, out, *("-n", "6", "--checkpoint.every", "2", "--sample.tokens", "5", "--sample.prompt", "9")
            )
        )
    assert status == 0
    return out


def test_help(capsys):
    with pytest.raises(SystemExit) as left:
        parse(["paper-8k", "--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    for word in (*PRESETS, "--data", "--attention", "--resume", "--learning-rate", "8192"):
        assert word in shown


def test_presets_and_options():
    assert parse([]) == PRESETS["cpu-small"][1]
    config = parse(["paper-16k", "--data", "enwik8", "--data-dir", "d", "--attention", "hash", "--resume"])
    assert (config.batch.length, config.data.source, config.data.folder) == (16_384, "enwik8", pathlib.Path("d"))
    assert config.resume == "newest"
    layers = ["dense", "hash", "qk", "hash"]
    assert list(parse(["--attention", *layers]).model.attention) == layers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["paper-9k"], "no preset 'paper-9k'"),
        (["--attention", "hash", "qk"], "one for each of the"),
        (["--attention", "local", "--model.window", "None"], "needs --model.window"),
        (["--buckets", "5"], "must be even"),
        (["--model.width", "30"], "not a multiple"),
        (["--rate", "1.0", "--attention", "qk"], "below 1"),
        (["--attention", "auto", "--buckets", "5"], "must be even"),
        (["--attention", "auto", "--model.auto-sparse", "qk", "--rate", "1.0"], "below 1"),
        (["--attention", "auto", "--model.auto-density", "0"], r"--model.auto-density must lie in \(0, 1\]"),
        (["--steps", "0"], "at least 1"),
        (["--length", "100"], "must fit"),
        (["--model.window", "0"], "--model.window must be at least 1, got 0"),
        (["--attention", "window", "--model.window", "None"], "--model.attention window needs --model.window"),
        (["--model.sinks", "-1"], "--model.sinks must not be negative, got -1"),
        (["--model.block-size", "0"], "--model.block-size must be at least 1, got 0"),
        (["--model.block-count", "0"], "--model.block-count must be at least 1, got 0"),
        (
            ["--attention", "block_top_k", "--model.block-size", "4096"],
            "--model.block-size 4096 is more than --batch.length 2048",
        ),
        (["--model.width", "0"], "--model.width must be at least 1"),
        (["--model.key-heads", "0"], "--model.key-heads must be at least 1"),
        (["--model.mlp-ratio", "0"], "--model.mlp-ratio must be at least 1"),
        (["--model.shared-qk", "--model.key-heads", "2"], "--model.key-heads 2.*shared_qk"),
        (["--model.key-heads", "3"], "--model.key-heads 3.*must divide"),
        (["--model.width", "36"], "head_dim must be even, got 9"),
        (
            ["--attention", "dense", "--model.dense-backend", "xla", "--data.separate-documents"],
            "--model.dense-backend xla cannot keep documents apart",
        ),
        (["--centred", "--data.separate-documents"], "--model.centred centres across documents"),
        (
            ["--attention", "qk", "--model.rates", "0.5", "0.2"],
            "--model.rates takes one for each of the 4 heads, got 2",
        ),
        (["--model.rates", "0.5", "0.2", "0.1", "1"], r"--model.rates must lie in \[0, 1\), got 0.5 0.2 0.1 1"),
        (["--model.rounds", "0"], "--model.rounds must be at least 1, got 0"),
        (
            ["--model.rotated", "--model.positions", "learned"],
            "--model.rotated needs --model.positions rope, got learned",
        ),
        (["--attention", "auto", "--model.rounds", "2"], "--model.rounds, --model.near: nothing was measured"),
        (["--attention", "auto", "--model.near", "9"], "--model.rounds, --model.near: nothing was measured"),
        (["--model.near", "0"], "--model.near must be at least 1, got 0"),
        (["--evaluation.lengths", "512", "0"], "--evaluation.lengths must be at least 1, got 0"),
        (
            ["--evaluation.lengths", "512", "4096", "--model.positions", "learned"],
            "--evaluation.lengths 4096 is beyond the 2048 learned positions of --batch.length",
        ),
        (["--optimizer.ema", "1"], "--optimizer.ema must lie between 0 and 1, got 1"),
        (["--optimizer.max-skipped", "0"], "--optimizer.max-skipped must be at least 1, got 0"),
        (["--centred", "--data.packing", "documents"], "--model.centred centres across documents"),
        (["--model.implementation", "mosaic"], "--model.implementation mosaic: "),
        (["--model.param-dtype", "bfloat16"], "--model.param-dtype bfloat16 needs --model.dtype bfloat16, got float32"),
        (["--lr", "0"], "--learning-rate must be above 0"),
        (["--lr", "nan"], "--learning-rate must be above 0"),
        (["--optimizer.clip-norm", "0"], "--optimizer.clip-norm must be above 0"),
        (["--optimizer.beta2", "1"], r"--optimizer.beta2 must lie in \[0, 1\)"),
        (["--data.max-megabytes", "-1"], "--data.max-megabytes must be above 0"),
        (["--data.streaming"], "--data.streaming needs a Hugging Face data set"),
        (["--seed", "-1"], "--seed must not be negative"),
    ],
)
def test_contradictions(options, message):
    with pytest.raises(ConfigError, match=message):
        parse(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nowhere.txt"], "nowhere.txt: no such file or folder"),
        (["--data", "enwik8", "--data-dir", "nowhere"], "no enwik8.xz in nowhere"),
        (["--tokenizer", "nowhere.json"], "nowhere.json: not a readable tokenizers JSON file"),
        (["--resume", "nowhere"], "no checkpoint in nowhere"),
        (["--length", "200000"], "too few for a sequence"),
    ],
)
def test_errors_are_one_line(text, tmp_path, capsys, options, message):
    assert train.main([*arguments(text, tmp_path / "run"), *options]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_leaves_its_files(finished):
    assert [step for step, _ in losses(finished)] == [1, 2, 3, 4, 5, 6]
    records = read_metrics(finished / "metrics.jsonl")
    assert [record["kind"] for record in records[6:]] == ["final", "sample", "end"]
    first, evaluation = records[0], records[6]
    assert set(first) >= {"loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second", "visible", "overflow"}
    assert len(first["visible"]) == 1
    assert 0 < first["visible"][0] < 1
    assert evaluation["bits_per_byte"] == pytest.approx(evaluation["loss"] / np.log(2), rel=0.05)
    assert evaluation["unigram"]["loss"] < np.log(257)
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["4", "6"]
    assert json.loads((finished / "config.json").read_text())["steps"] == 6
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (finished / "sample.txt").exists()


def test_evaluates_at_other_lengths(text, finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "run")
    options = ("-n", "6", "--resume", "--evaluation.final-windows", "0", "--evaluation.lengths", "16", "64", "200")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert train.main(arguments(text, out, *options)) == 0
    (final,) = [record for record in read_metrics(out / "metrics.jsonl") if record["kind"] == "final"]
    assert [each["length"] for each in final["lengths"]] == [16, 64, 200]
    same = final["lengths"][1]
    assert {name: final[name] for name in ("loss", "bits_per_byte")} == {
        name: same[name] for name in ("loss", "bits_per_byte")
    }
    shown = capsys.readouterr().out
    for each in final["lengths"]:
        # The same text each time, and a model that has barely learned: bytes of about 8 bits.
        assert each["bits_per_byte"] == pytest.approx(final["bits_per_byte"], rel=0.05)
        assert f"held-out at {each['length']} tokens: loss {each['loss']:.3f} nats a token" in shown


def test_the_trained_model_is_made_again(finished):
    checkpoint = finished / "checkpoints" / "4"
    trained, newest = load_trained(checkpoint), load_trained(finished)
    assert (trained.checkpoint, newest.checkpoint.name) == (checkpoint, "6")
    saved = checkpoint_arrays(checkpoint)
    params = jax.tree_util.tree_leaves_with_path(nnx.state(trained.model))
    assert len(params) == sum(name.startswith(".params") for name in saved)
    for path, leaf in params:
        np.testing.assert_array_equal(leaf, saved[f".params{jax.tree_util.keystr(path)}"])


def test_kinds_by_turns(tmp_path):
    kinds = ("--model.layers", "3", "--attention", "window", "block_top_k", "hash", "--model.window", "9")
    options = arguments("text", tmp_path, *kinds)
    config = parse(options)
    patterns = Window(9, sinks=4), BlockTopK(16, 3), Hash(4, exclude_self=True)
    assert transformer_config(config, 257).patterns == patterns
    write_config(tmp_path / "config.json", config)
    assert read_config(tmp_path / "config.json") == config
    given = parse([*options, "--model.sinks", "0", "--model.block-size", "8", "--model.block-count", "2"])
    assert transformer_config(given, 257).patterns[:2] == (Window(9), BlockTopK(8, 2))


def test_what_looks_ahead_gives_no_sample(text, tmp_path, capsys):
    out = tmp_path / "run"
    options = ("-n", "1", "--attention", "block_top_k", "--sample.tokens", "5", "--sample.prompt", "9")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert train.main(arguments(text, out, *options)) == 0
    assert "no sample: BlockTopK(block_size=16, count=3) chooses by the mean" in capsys.readouterr().out
    records = read_metrics(out / "metrics.jsonl")
    assert [record["kind"] for record in records] == ["train", "final", "end"]
    # Of 4 blocks all see their own and two earlier ones, the last alone not all.
    assert records[0]["visible"] == pytest.approx([1 - 16 * 16 / (64 * 65 / 2)])


@pytest.mark.parametrize(("length", "size"), [(1, 16), (300, 16), (2048, 128), (8192, 512), (65_536, 512)])
def test_blocks_suit_the_length(length, size):
    assert TrainConfig(batch=BatchConfig(length=length)).block_size == size


def test_blocks_that_kernels_do_not_take(monkeypatch):
    monkeypatch.setattr(check, "check_implementation", lambda *_: None)  # as if there were a GPU
    options = ["--attention", "block_top_k", "--model.implementation", "triton", "--model.block-size"]
    parse([*options, "32"])
    with pytest.raises(ConfigError, match=r"--model.block-size 24: .*multiples of 16"):
        parse([*options, "24"])


def test_auto_is_chosen_once_and_said(text, tmp_path, capsys, monkeypatch):
    row = {"length": 64, "own_dense": 1.0, "hash": [[0.25, 2.0]], "qk": [[0.49, 0.5]]}
    monkeypatch.setattr(time_share, "_measured", lambda: {"cpu": {"lengths": [row]}})
    out = tmp_path / "run"
    options = arguments(text, out, "-n", "1", "--attention", "auto")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert train.main(options) == 0
    assert "auto    dense: at 64 tokens and density 0.25 Hash(num_buckets=4" in capsys.readouterr().out
    assert read_metrics(out / "metrics.jsonl")[0]["visible"] == pytest.approx([1.0])
    assert json.loads((out / "config.json").read_text())["model"]["attention"] == ["auto"]
    dense, sparse = (parse([*options, "--model.auto-sparse", kind]) for kind in ("hash", "qk"))
    assert transformer_config(dense, 257).patterns == (Dense(),)
    assert transformer_config(sparse, 257).patterns == (QK(0.3),)


def test_auto_that_chooses_otherwise_does_not_go_on(text, tmp_path, capsys, monkeypatch):
    def status_where_sparse_takes(share, *options):
        row = {"length": 64, "own_dense": 1.0, "hash": [[0.25, share]], "qk": [[0.49, share]]}
        monkeypatch.setattr(time_share, "_measured", lambda: {"cpu": {"lengths": [row]}})
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return train.main(arguments(text, tmp_path / "run", "-n", "1", "--attention", "auto", *options))

    assert status_where_sparse_takes(2.0) == 0
    assert status_where_sparse_takes(1.5, "--resume") == 0
    assert status_where_sparse_takes(0.5, "--resume") == 2
    assert "auto was 'dense', now 'hash'" in capsys.readouterr().err


def test_a_run_is_not_overwritten(text, finished, capsys):
    assert train.main(arguments(text, finished, "-n", "6")) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_each_run_has_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse([])
    assert [choose_folder(config).root.name for _ in range(2)] == ["cpu-small-1", "cpu-small-2"]
    # Others that looked at the same moment saw no folder.
    monkeypatch.setattr(run_folder, "_numbered", lambda name: {})
    assert choose_folder(config).root.name == "cpu-small-3"


def test_a_run_without_a_checkpoint_is_not_overwritten(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match="already holds a run without a checkpoint"):
        choose_folder(parse(["--out", str(tmp_path)]))


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot make this folder"):
        choose_folder(parse(["--out", str(tmp_path / "file")]))


def test_failed_writes_end_in_one_error(tmp_path, monkeypatch):
    def fail(*arguments, **keywords):
        raise RuntimeError("disk on fire")

    state = TrainState(jnp.zeros((), jnp.int32), nnx.State({}), ())
    checkpoints = Checkpoints(tmp_path, 1, {})
    close = checkpoints._manager.close
    monkeypatch.setattr(checkpoints._manager, "save", fail)
    monkeypatch.setattr(checkpoints._manager, "close", fail)
    with pytest.raises(CheckpointError, match="step 1 cannot be written: disk on fire"), checkpoints:
        checkpoints.save(state, 1)
    close()


def test_foreign_checkpoints_are_refused(text, finished, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text("another text entirely\n" * 500)
    for options, message in (
        (["-n", "6", "--model.width", "32"], "model.width was 16, now 32"),
        (["-n", "7"], "steps was 6, now 7"),
        (["-n", "6", "--data", str(other)], "text was"),
    ):
        assert train.main([*arguments(text, finished, "--resume"), *options]) == 2
        assert message in capsys.readouterr().err


def test_settings_newer_than_a_checkpoint_had_their_defaults(text, finished, tmp_path, capsys):
    out = tmp_path / "older"
    shutil.copytree(finished, out)
    path = out / "checkpoints" / "6" / "record" / "metadata"
    record = json.loads(path.read_text())
    for name in ("model.centred", "model.auto_sparse", "model.auto_density"):
        del record["identity"][name]
    path.write_text(json.dumps(record))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert train.main(arguments(text, out, "-n", "6", "--resume")) == 0
    assert train.main(arguments(text, out, "-n", "6", "--resume", "--centred")) == 2
    assert "model.centred was False, now True" in capsys.readouterr().err


def test_damaged_checkpoints_are_named(text, finished, tmp_path, capsys):
    def resume(damage):
        out = tmp_path / damage.__name__
        shutil.copytree(finished, out)
        damage(out / "checkpoints" / "6")
        assert train.main(arguments(text, out, "-n", "6", "--resume")) == 2
        shown = capsys.readouterr().err
        assert str(out) in shown
        assert "damaged" in shown

    def no_record(checkpoint):
        shutil.rmtree(checkpoint / "record")

    def no_state(checkpoint):
        shutil.rmtree(checkpoint / "state")

    def cut_arrays(checkpoint):
        for path in (checkpoint / "state").rglob("*"):
            if path.is_file() and path.stat().st_size > 1000:
                path.write_bytes(path.read_bytes()[:100])

    for damage in (no_record, no_state, cut_arrays):
        resume(damage)


def test_an_older_checkpoint_branches_off_only(text, finished, tmp_path, capsys):
    older = str(finished / "checkpoints" / "4")
    assert train.main([*TINY, "--data", text, "-n", "6", "--resume", older]) == 2
    assert "branch off" in capsys.readouterr().err


def test_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(text, tmp_path, capsys):
    out = tmp_path / "run"
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        options = ("-n", "50", "--checkpoint.every", "1", "--checkpoint.keep", "1", "--lr", "1e30")
        assert train.main(arguments(text, out, *options, "--optimizer.weight-decay", "0")) == 1
    shown = capsys.readouterr().err
    assert "training stopped" in shown
    steps = [int(path.name) for path in (out / "checkpoints").iterdir()]
    assert f"the last good checkpoint is {out / 'checkpoints' / str(steps[0])}" in shown
    arrays = checkpoint_arrays(out / "checkpoints" / str(steps[0]))
    assert all(np.isfinite(array).all() for array in arrays.values())


# train.py in a process that kills itself before it logs a step, or at the so-maniest touch of a folder.
KILLED = """
import os, signal, sys
import train
from training.metrics import MetricsLog

step, folder, touches = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
write = MetricsLog.write

def write_or_die(log, kind, done, **values):
    if done == step:
        os.kill(os.getpid(), signal.SIGKILL)
    write(log, kind, done, **values)

def count_touches(event, arguments):
    global touches
    path = arguments[0] if arguments else None
    if isinstance(path, (str, os.PathLike)) and folder in os.fspath(path):
        touches -= 1
        if touches == 0:
            os.kill(os.getpid(), signal.SIGKILL)

MetricsLog.write = write_or_die
sys.addaudithook(count_touches)
sys.exit(train.main(sys.argv[4:]))
"""


def test_killed_and_resumed_is_the_unbroken_run(text, tmp_path):
    """Killed at a random step, and once more while a random checkpoint is half written."""
    seed = time.time_ns()
    chosen = random.Random(seed)
    # Checkpoint 20 is whole before 40 is begun; what the first kill leaves unfinished is not yet `checkpoint`.
    first_step, checkpoint, touch = chosen.randrange(41, 80), chosen.choice((80, 100)), chosen.randrange(1, 13)
    print(f"seed {seed}: killed at step {first_step}, then at touch {touch} of checkpoint {checkpoint}")

    options = ("-n", "120", "--checkpoint.every", "20")
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    whole = run(*arguments(text, unbroken, *options))
    unfinished = broken / "checkpoints" / f"{checkpoint}.orbax-checkpoint-tmp"
    resume = arguments(text, broken, *options, "--resume")
    for place, given in (
        ((first_step, "nowhere", 0), arguments(text, broken, *options)),
        ((0, unfinished, touch), resume),
    ):
        killed = run(*map(str, place), *given, program=("-c", KILLED))
        _, errors = killed.communicate(timeout=300)
        assert killed.returncode == -signal.SIGKILL, errors
    assert steps_in(broken)[-1] == checkpoint - 20
    assert unfinished.exists() or touch == 1  # the first touch makes it

    resumed = run(*resume)
    for process in (whole, resumed):
        shown, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    assert f"resumed {broken / 'checkpoints' / str(checkpoint - 20)}, step {checkpoint - 20}\n" in shown
    assert losses(broken) == losses(unbroken)
    assert sorted(path.name for path in (broken / "checkpoints").iterdir()) == ["100", "120"]
    first, second = (checkpoint_arrays(out / "checkpoints" / "120") for out in (unbroken, broken))
    assert first.keys() == second.keys()
    for name, array in first.items():
        assert array.tobytes() == second[name].tobytes(), name


def test_sigterm_saves_and_leaves_in_order(text, tmp_path):
    out = tmp_path / "run"
    options = ("-n", "1000000", "--checkpoint.every", "0")
    process = run(*arguments(text, out, *options))
    wait_for(lambda: len(losses(out)) >= 5, process)
    process.send_signal(signal.SIGTERM)
    shown, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert not errors
    records = read_metrics(out / "metrics.jsonl")
    assert records[-1]["reason"] == "SIGTERM"
    assert (out / "checkpoints" / str(records[-1]["step"]) / "state").is_dir()
    assert "go on with --resume" in shown


def test_a_time_limit_says_how_to_go_on(text, tmp_path, capsys):
    out = tmp_path / "run"
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        options = ["-n", "50", "--max-minutes", "0", "--evaluation.every", "1", "--log-every", "9"]
        assert train.main(arguments(text, out, *options)) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "stopped by the time limit after step 1 of 50; go on with --resume" in shown
    kinds = [record["kind"] for record in read_metrics(out / "metrics.jsonl")]
    assert kinds == ["evaluation", "final", "end"]
    assert "training loss unknown: no finite one was logged" in shown


def test_metrics_resume_after_a_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    for step in (1, 2, 3):
        log.write("train", step, loss=float("nan"), visible=[0.5], training_seconds=10.0 * step)
    log.close()
    with path.open("a") as file:
        file.write('{"kind": "train", "st')
    log = MetricsLog(path, 2)
    assert log.training_seconds == 20
    for kind in ("final", "sample", "end"):
        log.write(kind, 2, training_seconds=21.5)
    log.close()
    log = MetricsLog(path, 2)
    assert log.training_seconds == Throughput(log.training_seconds).seconds == 21.5
    log.write("train", 3, loss=1.0)
    log.close()
    assert [(record["step"], record["loss"]) for record in read_metrics(path)] == [(1, None), (2, None), (3, 1.0)]


def test_identity_leaves_out_what_only_watches():
    config = PRESETS["cpu-small"][1]
    watched = dataclasses.replace(config, log_every=77, out=pathlib.Path("x"), max_minutes=1.0)
    assert identity(watched) == identity(config)
    assert identity(dataclasses.replace(config, seed=1)) != identity(config)
