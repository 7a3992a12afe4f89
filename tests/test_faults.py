"""What goes wrong while a model trains: nothing is lost but the steps since the last checkpoint."""

import contextlib
import json
import os
import pathlib
import resource
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

import train
from models.transformer import LayerStats
from tests.test_train_cli import arguments, checkpoint_arrays, losses
from tests.test_train_cli import finished as finished
from tests.test_train_cli import text as text
from training.checkpoint import Checkpoints, restore
from training.config import OptimizerConfig, TrainConfig, identity
from training.errors import CheckpointError, NonFiniteLossError, OutputError
from training.metrics import MetricsLog, read_metrics
from training.progress import TrainProgress
from training.report import Report
from training.step import Skipped, StepMetrics, TrainState
from training.throughput import Throughput

IDENTITY = identity(TrainConfig())
SPARE = 24 << 10  # bytes that a full disk has left: metrics fit, arrays do not


def main(*options):
    """The exit status of the command line."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return train.main([str(option) for option in options])


def one_line(capsys):
    shown = capsys.readouterr().err
    assert shown.startswith("train.py: ")
    assert shown.count("\n") == 1
    return shown


def assert_same_arrays(first, second):
    first, second = checkpoint_arrays(first), checkpoint_arrays(second)
    assert first.keys() == second.keys()
    for name, array in first.items():
        assert array.tobytes() == second[name].tobytes(), name


@pytest.fixture
def broken_off(finished, tmp_path):
    """The finished run as it was when only the checkpoint of step 4 was there."""
    out = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(out / "checkpoints" / "6")
    return out


@pytest.fixture
def disk(tmp_path):
    """A folder on a small disk of its own, where one may be mounted; else one whose files cannot grow large.

    Gives the folder and a context manager in which so many bytes are left.
    """
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder]
    mounted = shutil.which("mount") is not None and subprocess.run(mount, capture_output=True).returncode == 0

    @contextlib.contextmanager
    def full(spare):
        filler = folder / "filler"
        free = os.statvfs(folder)
        filler.write_bytes(bytes(max(free.f_bavail * free.f_bsize - spare, 0)))
        yield
        filler.unlink()

    @contextlib.contextmanager
    def limited(spare):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (spare, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    yield folder, full if mounted else limited
    if mounted:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk_leaves_the_checkpoint_before(finished, broken_off, disk, capsys):
    folder, full = disk
    out = pathlib.Path(shutil.move(broken_off, folder / "run"))
    with full(SPARE):
        assert main("--resume", out) == 2
    shown = one_line(capsys)
    assert "checkpoint of step 6 cannot be written" in shown
    assert "No space left on device" in shown or "File too large" in shown
    assert f"{out / 'checkpoints' / '4'} is there to go on from" in shown
    assert [step for step, _ in losses(out)] == [1, 2, 3, 4, 5, 6]
    assert_same_arrays(out / "checkpoints" / "4", finished / "checkpoints" / "4")
    assert main("--resume", out) == 0
    assert losses(out) == losses(finished)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["4", "6"]
    assert_same_arrays(out / "checkpoints" / "6", finished / "checkpoints" / "6")


def test_metrics_that_cannot_be_written_are_named(broken_off, disk, capsys):
    folder, full = disk
    out = pathlib.Path(shutil.move(broken_off, folder / "run"))
    before = read_metrics(out / "metrics.jsonl")
    with full(0):
        assert main("--resume", out) == 2
    assert f"{out / 'metrics.jsonl'}: cannot be written: " in one_line(capsys)
    assert read_metrics(out / "metrics.jsonl") == before


def test_metrics_before_a_failed_write_are_whole(disk):
    folder, full = disk
    path = folder / "metrics.jsonl"
    log = MetricsLog(path, 0)

    def write_until_it_fails():
        for step in range(1, 10_000):
            log.write("train", step, loss=1.0)
            written.append(step)

    written = []
    with full(0):
        with pytest.raises(OutputError, match=r"metrics.jsonl: cannot be written"):
            write_until_it_fails()
        with pytest.raises(OutputError, match="cannot be written"):
            log.close()
    assert [record["step"] for record in read_metrics(path)] == written


def test_a_run_skips_steps_that_are_not_finite(text, tmp_path, monkeypatch, capsys):
    """With an average, in bfloat16, and gone on with: the step that is skipped is the third."""
    make_train_step = train.make_train_step

    def make_step_that_breaks_once(*options, **settings):
        step = make_train_step(*options, **settings)

        def break_once(state, batch):
            if int(state.step) != 2:
                return step(state, batch)
            kept = jax.tree.map(jnp.copy, state.params)
            broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), state.params)
            state, measured = step(state._replace(params=broken), batch)
            return state._replace(params=kept), measured

        return break_once

    def noted(name, place):
        inner = getattr(train, name)

        def note(*arguments):
            assert {leaf.dtype.name for leaf in jax.tree.leaves(arguments[place])} == {"float32"}
            evaluated.append(name)
            return inner(*arguments)

        return note

    evaluated: list[str] = []
    monkeypatch.setattr(train, "evaluate", noted("evaluate", 1))
    monkeypatch.setattr(train, "continue_held_out", noted("continue_held_out", 2))
    monkeypatch.setattr(train, "make_train_step", make_step_that_breaks_once)
    out = tmp_path / "run"
    precision = ["--model.dtype", "bfloat16", "--model.param-dtype", "bfloat16"]
    options = ["-n", "6", "--checkpoint.every", "2", "--optimizer.ema", "0.9", *precision]
    assert main(*arguments(text, out, *options, "--optimizer.non-finite", "skip")) == 0
    records = [record for record in read_metrics(out / "metrics.jsonl") if record["kind"] == "train"]
    assert [record["skipped"] for record in records] == [0, 0, 1, 1, 1, 1]
    assert [record["step"] for record in records if record["loss"] is None] == [3]
    shown = capsys.readouterr().out
    assert "1 steps skipped" in shown
    assert "training loss nan" not in shown

    resumed = shutil.copytree(out, tmp_path / "resumed")
    shutil.rmtree(resumed / "checkpoints" / "6")
    assert main("--resume", resumed) == 0
    assert_same_arrays(resumed / "checkpoints" / "6", out / "checkpoints" / "6")
    arrays = checkpoint_arrays(out / "checkpoints" / "6")
    assert (arrays[".step"], arrays[".skipped.steps"], arrays[".skipped.in_a_row"]) == (6, 1, 0)
    averages = {name: array for name, array in arrays.items() if name.startswith(".ema")}
    assert averages
    for name, array in averages.items():
        assert array.dtype == np.float32
        assert arrays[name.replace(".ema", ".params")].dtype == jnp.bfloat16
    # What evaluates and samples is the average, in float32, not the parameters.
    assert evaluated == ["evaluate", "continue_held_out"] * 2


def test_too_many_skipped_in_a_row_end_the_run(tmp_path):
    optimizer = OptimizerConfig(non_finite="skip", max_skipped=3)
    progress = TrainProgress(0, 50, Console(quiet=True))
    metrics = MetricsLog(tmp_path / "metrics.jsonl", 0)
    report = Report(TrainConfig(optimizer=optimizer), lambda step: 1.0, metrics, progress, Throughput())
    layers = LayerStats(jnp.ones((1,)), jnp.zeros((1,), jnp.int32))

    def measured(loss, norm, in_a_row):
        counts = Skipped(*(jnp.asarray(count, jnp.int32) for count in (in_a_row + 5, in_a_row)))
        return StepMetrics(jnp.asarray(loss), jnp.asarray(norm), layers, counts)

    report.step(1, measured(np.nan, 1.0, in_a_row=1))
    report.step(2, measured(1.0, np.inf, in_a_row=2))
    with pytest.raises(NonFiniteLossError, match=r"step 3: .*: 3 steps in a row were skipped, --optimizer.max-skipped"):
        report.step(3, measured(np.nan, 1.0, in_a_row=3))
    metrics.close()
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["reason"] == "non-finite loss"


def small_state(step):
    rng = np.random.default_rng(step)
    params = nnx.State({"a": rng.normal(size=(64, 64)).astype(np.float32), "b": jnp.ones((8,), jnp.bfloat16)})
    return TrainState(jnp.asarray(step, jnp.int32), params, ())


@pytest.fixture
def saved(tmp_path):
    """Checkpoints of steps 4 and 6 of a small state."""
    with Checkpoints(tmp_path / "run" / "checkpoints", 2, IDENTITY) as checkpoints:
        checkpoints.save(small_state(4), 4)
        checkpoints.save(small_state(6), 6)
    return tmp_path / "run" / "checkpoints"


@pytest.mark.parametrize("damage", ["cut", "empty", "changed", "gone"])
def test_damage_of_any_file_is_noticed_or_harmless(saved, tmp_path, damage):
    noticed = 0
    files = [path.relative_to(saved) for path in sorted((saved / "6").rglob("*")) if path.is_file()]
    for number, file in enumerate(files):
        damaged = shutil.copytree(saved, tmp_path / str(number) / "checkpoints")
        path = damaged / file
        content = path.read_bytes()
        middle = len(content) // 2
        match damage:
            case "cut":
                path.write_bytes(content[:middle])
            case "empty":
                path.write_bytes(b"")
            case "changed":
                path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
            case "gone":
                path.unlink()
        try:
            state = restore(damaged / "6", small_state(0), IDENTITY)
        except CheckpointError as error:
            shown = str(error)
            noticed += 1
            older = f"delete it to go on from {damaged / '4'}" in shown
            # A change of a setting in the record cannot be told from another run's settings.
            named = shown.startswith(str(damaged / "6")) and (older or "belongs to another run" in shown)
        else:
            named = all(map(np.array_equal, jax.tree.leaves(state), jax.tree.leaves(small_state(6))))
        assert named, file
        jax.tree.map(np.testing.assert_array_equal, restore(damaged / "4", small_state(0), IDENTITY), small_state(4))
    # The record, the manifest, the tree and the arrays, at least; of which a changed byte may be in a date.
    assert noticed >= (2 if damage == "changed" else 4)


def test_the_checkpoint_before_a_damaged_one_goes_on(finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "run")
    arrays = max((out / "checkpoints" / "6" / "state").rglob("*"), key=lambda path: path.stat().st_size)
    arrays.write_bytes(arrays.read_bytes()[:1000])
    assert main("--resume", out) == 2
    assert f"delete it to go on from {out / 'checkpoints' / '4'}" in one_line(capsys)
    shutil.rmtree(out / "checkpoints" / "6")
    assert main("--resume", out) == 0
    assert_same_arrays(out / "checkpoints" / "6", finished / "checkpoints" / "6")


def test_checkpoints_with_and_without_counts_of_skipped_steps(saved, tmp_path):
    zero, two = jnp.zeros((), jnp.int32), jnp.asarray(2, jnp.int32)
    counting = small_state(0)._replace(skipped=Skipped(zero, zero))
    state = restore(saved / "6", counting, IDENTITY)
    jax.tree.map(np.testing.assert_array_equal, state, small_state(6)._replace(skipped=Skipped(zero, zero)))
    with Checkpoints(tmp_path / "skipping" / "checkpoints", 1, IDENTITY) as checkpoints:
        checkpoints.save(small_state(7)._replace(skipped=Skipped(two, two)), 7)
    checkpoint = tmp_path / "skipping" / "checkpoints" / "7"
    assert restore(checkpoint, counting, IDENTITY).skipped == (2, 2)
    jax.tree.map(np.testing.assert_array_equal, restore(checkpoint, small_state(0), IDENTITY), small_state(7))


def test_checkpoints_from_before_checksums(saved):
    path = saved / "6" / "record" / "metadata"
    record = json.loads(path.read_text())
    del record["checksums"]
    path.write_text(json.dumps(record))
    jax.tree.map(np.testing.assert_array_equal, restore(saved / "6", small_state(0), IDENTITY), small_state(6))
