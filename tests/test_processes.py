"""Two real processes that train as one: the losses of one process, stopping together, and one of them dying."""

import os
import pathlib
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import train
from training.config import DistributedConfig
from training.errors import ConfigError
from training.metrics import read_metrics
from training.processes import join
from training.run_folder import steps_in

ROOT = pathlib.Path(__file__).parents[1]
TINY = [
    *("--model.layers", "3", "--model.width", "16", "--model.heads", "2", "--buckets", "4", "--rate", "0.3"),
    *("--attention", "dense", "hash", "qk", "--length", "32", "--batch-size", "4", "--log-every", "1", "-n", "100000"),
    *("--evaluation.every", "10", "--evaluation.windows", "2", "--evaluation.final-windows", "2"),
    *("--sample.prompt", "4", "--checkpoint.every", "5"),
    *("--optimizer.warmup", "0.0001", "--optimizer.ema", "0.9", "--optimizer.non-finite", "skip"),
]


def arguments(folder, *options):
    return [*TINY, "--data", str(folder / "text.txt"), *options]


def start_two(folder, *options, of_second=()):
    """Each with two devices, between which and over which parameters are divided."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",  # of what runs for milliseconds
    }
    together = ["--mesh", "fsdp=4", "--distributed.coordinator", f"localhost:{port}", "--distributed.processes", "2"]
    together += ["--distributed.heartbeat", "20", "--evaluation.lengths", "16", "--sample.tokens", "4"]
    command = [sys.executable, "train.py", *arguments(folder, *options), *together, "--distributed.process"]
    return [
        subprocess.Popen([*command, *number], cwd=ROOT, env=environment, stdout=-1, stderr=-1, text=True)
        for number in (["0"], ["1", *of_second])
    ]


def wait_for_step(out, step, process):
    deadline = time.monotonic() + 300
    while step not in losses(out):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def losses(out):
    return {
        record["step"]: record["loss"] for record in read_metrics(out / "metrics.jsonl") if record["kind"] == "train"
    }


def train_a_step(folder, *options):
    """In this process, on four devices: one step, for which the time limit leaves just time enough."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        alone = ["--mesh", "data=4", "--max-minutes", "0", "--sample.tokens", "0"]
        assert train.main(arguments(folder, *options, *alone)) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"auto": True, "process": 1}, "--distributed.auto finds out what --distributed.process would say"),
        ({"coordinator": "host:1"}, "need --distributed.processes and --distributed.process, too"),
        ({"coordinator": "host:1", "processes": 2, "process": 2}, r"must lie in \[0, 2\), got 2"),
        ({"auto": True, "timeout": 0}, "must be at least 1 second"),
    ],
)
def test_settings_that_name_no_others(options, message):
    with pytest.raises(ConfigError, match=message):
        join(DistributedConfig(**options))


def test_whom_the_cluster_names(monkeypatch):
    """Slurm, Open MPI and Kubernetes are JAX's to ask: it is told nothing."""
    asked = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given, **times: asked.append((given, times)))
    join(DistributedConfig())
    assert not asked  # one process
    join(DistributedConfig(auto=True, timeout=7, heartbeat=8))
    assert asked == [((None,) * 3, {"initialization_timeout": 7, "heartbeat_timeout_seconds": 8})]

    def fail(*given, **times):
        raise RuntimeError("no cluster\n was found")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(ConfigError, match="cannot meet the other processes: no cluster was found"):
        join(DistributedConfig(auto=True))


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
def test_two_processes_train_as_one(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"line {number}: the same words again\n" for number in range(2000)))
    out, alone = tmp_path / "two", tmp_path / "one"

    # One dies. The other does not wait for it for ever, and says how to go on.
    both = start_two(tmp_path, "--out", str(out))
    wait_for_step(out, 13, both[0])
    both[1].kill()
    both[1].communicate()
    _, errors = both[0].communicate(timeout=300)
    assert both[0].returncode not in (0, None)
    # Where it waits in a barrier, which knows nothing of its peers, the missing heartbeat ends it, in JAX's own words.
    assert "start all again with --resume" in errors or "another task died" in errors
    saved, of_two = steps_in(out)[-1], losses(out)
    assert saved >= 5

    # Both go on. The second has no time left, so both stop after the same step, and evaluate and sample together.
    both = start_two(tmp_path, "--resume", str(out), of_second=["--max-minutes", "0"])
    shown = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], shown
    assert "fsdp 4, by jit, 2 processes" in shown[0][0]
    assert f"stopped by the request of another process after step {saved + 1}" in shown[0][0]
    assert "held out" not in shown[1][0]  # the first alone speaks
    records = {record["kind"]: record for record in read_metrics(out / "metrics.jsonl")}
    assert [each["length"] for each in records["final"]["lengths"]] == [16]
    assert (out / "sample.txt").read_text()
    assert steps_in(out)[-1] == saved + 1

    # Their parameters, which no process had all of, go on in one process; and its losses are theirs, from the first.
    train_a_step(tmp_path, "--resume", str(out))
    train_a_step(tmp_path, "--out", str(alone))
    assert (steps_in(out)[-1], steps_in(alone)[-1]) == (saved + 2, 1)
    again = {step: loss for step, loss in losses(out).items() if step > saved and step in of_two}
    for step, loss in (losses(alone) | again).items():
        np.testing.assert_allclose(loss, of_two[step], rtol=1e-5)
