"""How well and how fast language models learn: the same text, order and model, told apart by attention alone.

python benchmarks/language_models.py headline --data-dir FOLDER         a group of language_runs.py, on all GPUs
python benchmarks/language_models.py choices --only '*-hash16-seed0'    those that match
python benchmarks/language_models.py headline --minutes 9               stops in time; the same again goes on
python benchmarks/language_models.py headline --list                    names and settings

Each run is one of `train.py`, or of `train_reformer.py`, one after the other on each GPU. It is done when its last
step is, and is not run again; one that ran out of time goes on from its checkpoint under --runs, at the same commit and
on the same kind of device. Each leaves its metrics in benchmarks/results/language-models/NAME.jsonl, below a line that
says on what it ran. The exit status is 1 if a run failed.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # this process leaves the GPUs to the runs

import jax
from environment import ROOT, environment, on_one
from language_results import RESULTS
from language_runs import GROUPS, Run, chosen

from training.metrics import read_metrics

LEAST_MINUTES = 1.0  # below which no run is begun: it would compile and stop
LAST_MINUTES = 0.5  # of a run that stops, for its checkpoint and evaluation
SAME = ("device", "commit", "jax")  # what a run that goes on must have had from its beginning


def main() -> int:
    """Runs what is not done, and keeps what it measured; returns the exit status."""
    args = _arguments()
    runs = chosen(args.groups, args.only)
    if args.list:
        print(*(f"{run}: python {run.kind.script} {shlex.join(run.settings())}" for run in runs), sep="\n")
        return 0
    waiting: SimpleQueue[Run] = SimpleQueue()
    for run in runs:
        waiting.put(run)
    end = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    one_at_a_time, on = threading.Lock(), on_one(environment())
    failed: list[Run] = []

    def work(gpu: str) -> None:
        while True:
            try:
                run = waiting.get_nowait()
            except Empty:
                return
            minutes = None if end is None else (end - time.monotonic()) / 60 - LAST_MINUTES
            if minutes is not None and minutes < LEAST_MINUTES:
                return
            try:
                said = _train(run, args, on, gpu, minutes)
            except RuntimeError as error:
                failed.append(run)
                said = f"failed: {error}"
            with one_at_a_time:
                _keep(run, args)
                print(f"{run}: {said}", flush=True)

    gpus = _gpus()
    with ThreadPoolExecutor(len(gpus)) as pool:
        for done in [pool.submit(work, gpu) for gpu in gpus]:
            done.result()
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s GROUP ... [options] [-- SETTING ...]",
        description="Trains language models side by side; settings of train.py after -- go to all runs.",
    )
    parser.add_argument("groups", nargs="+", choices=GROUPS, help="groups of language_runs.py")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="runs whose names match")
    parser.add_argument(
        "--data-dir", type=Path, default=ROOT / "data", help="folder of enwik8.xz, eltec_eng.tar.xz, mnist/"
    )
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "language-models", help="folder of the runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--minutes", type=float, help="begin nothing and stop what runs in time to end by then")
    parser.add_argument("--list", action="store_true", help="print the runs and do nothing")
    words = sys.argv[1:]
    dashes = words.index("--") if "--" in words else len(words)
    return parser.parse_args(words[:dashes], argparse.Namespace(more=words[dashes + 1 :]))


def _gpus() -> list[str]:
    """The GPUs as CUDA_VISIBLE_DEVICES names them, each for one run at a time; without any the default device."""
    if jax.default_backend() != "gpu":
        return [""]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(device.id) for device in jax.devices()]


def _train(run: Run, args: argparse.Namespace, on: dict[str, Any], gpu: str, minutes: float | None) -> str:
    """Trains to the end or until the minutes are over; says how it went.

    Raises:
        RuntimeError: if it failed, or was begun elsewhere and may not go on here.
    """
    folder, begun_on = args.runs / str(run), args.runs / f"{run}.json"
    metrics = read_metrics(folder / "metrics.jsonl")
    if metrics and metrics[-1].get("reason") == "done":
        return "was done"
    begun = any((folder / "checkpoints").glob("[0-9]*"))
    if begun:
        before = json.loads(begun_on.read_text())
        if any(before[name] != on[name] for name in SAME):
            was, now = (", ".join(str(each[name]) for name in SAME) for each in (before, on))
            raise RuntimeError(f"begun on {was}; this is {now}. Go on there, or delete {folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)  # ended before its first checkpoint
        args.runs.mkdir(parents=True, exist_ok=True)
        begun_on.write_text(json.dumps(on))
    command = [sys.executable, str(ROOT / run.kind.script)]
    command += ["--resume", str(folder)] if begun else [*run.settings(), "--out", str(folder)]
    command += ["--data.folder", str(args.data_dir), *args.more]
    command += [] if minutes is None else ["--max-minutes", f"{minutes:.2f}"]
    settings = {name: value for name, value in os.environ.items() if name != "XLA_PYTHON_CLIENT_PREALLOCATE"}
    settings |= {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
    log = args.runs / f"{run}.log"
    with log.open("a") as output:
        start = time.monotonic()
        status = subprocess.run(command, cwd=ROOT, env=settings, stdout=output, stderr=output).returncode
    if status:
        said = " ".join(log.read_text().splitlines()[-3:])[-300:]
        raise RuntimeError(f"status {status}, {said}; all it said is in {log}")
    final = [record for record in read_metrics(folder / "metrics.jsonl") if record["kind"] in ("final", "end")]
    values = " ".join(f"{name} {record[name]}" for record in final for name in ("loss", "reason") if name in record)
    return f"{values}, {time.monotonic() - start:.0f} s in all"


def _keep(run: Run, args: argparse.Namespace) -> None:
    """Writes the metrics of a run that has any, below what it ran on."""
    metrics = args.runs / str(run) / "metrics.jsonl"
    if not metrics.exists():
        return
    of_run = {"kind": "run", "step": 0, "settings": [*run.settings(), *args.more]} | run._asdict()
    of_run["environment"] = json.loads((args.runs / f"{run}.json").read_text())
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{run}.jsonl").write_text(json.dumps(of_run) + "\n" + metrics.read_text("utf-8"), "utf-8")


if __name__ == "__main__":
    sys.exit(main())
