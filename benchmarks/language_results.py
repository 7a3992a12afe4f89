"""What the runs of `language_models.py` measured, by name, and how much sooner one reaches what another does."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from environment import on_one
from language_runs import Run

from training.metrics import read_metrics

RESULTS = Path(__file__).resolve().parent / "results" / "language-models"


class Curve(NamedTuple):
    """A run, as far as it came.

    Attributes:
        run: which.
        environment: device, versions, commit.
        steps, losses, seconds: of each record of training; seconds of training alone since the start.
        visible: share of visible pairs by record and layer, over rounds added up.
        held_out: loss on the same windows of held-out text, by step.
        final: loss and bits per byte on all held-out text, after the last step.
        peak_bytes: most memory in use at once; None where the device does not tell.
    """

    run: Run
    environment: dict[str, Any]
    steps: np.ndarray
    losses: np.ndarray
    seconds: np.ndarray
    visible: np.ndarray
    held_out: dict[int, float]
    final: dict[str, float]
    peak_bytes: int | None

    def seconds_at(self, step: float) -> float:
        """Seconds of training until a step."""
        return float(np.interp(step, [0, *self.steps], [0, *self.seconds]))

    def tokens_per_second(self) -> float:
        """Over the second half of the run: the first one compiles, and buckets settle."""
        half = len(self.steps) // 2
        tokens = (self.steps[-1] - self.steps[half]) * self.run.tokens_of_step
        return float(tokens / (self.seconds[-1] - self.seconds[half]))


def load_curves(folder: Path = RESULTS) -> dict[Run, Curve]:
    """Returns the finished runs of a folder."""
    curves = (_curve(read_metrics(path)) for path in sorted(folder.glob("*.jsonl")))
    return {curve.run: curve for curve in curves if curve is not None}


def _curve(records: list[dict[str, Any]]) -> Curve | None:
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_kind.setdefault(record["kind"], []).append(record)
    (first,), ended = by_kind["run"], by_kind.get("end")
    if not ended or ended[-1]["reason"] != "done":
        return None
    train = by_kind["train"]
    return Curve(
        Run(**{name: first[name] for name in Run._fields}),
        on_one(first["environment"]),
        *(np.array([record[name] for record in train]) for name in ("step", "loss")),
        seconds=_added_up([record["training_seconds"] for record in train]),
        visible=np.array([record["visible"] for record in train]),
        held_out={record["step"]: record["loss"] for record in by_kind.get("evaluation", [])},
        final={name: by_kind["final"][-1][name] for name in ("loss", "bits_per_byte")},
        peak_bytes=ended[-1]["peak_bytes"],
    )


def _added_up(seconds: list[float]) -> np.ndarray:
    """Up to commit 2a86b79 a run that went on from a checkpoint counted its seconds anew."""
    times = np.array(seconds)
    restarts = np.where(np.diff(times, prepend=0) < 0, np.roll(times, 1), 0)
    return times + np.cumsum(restarts)


def sooner(slow: Curve, fast: Curve) -> tuple[float, float, float | None]:
    """When a run reaches the loss that another had at its last evaluation in between, on the same windows.

    Returns:
        That loss, and the seconds that it took the one and the other, None where the other never reached it.
    """
    last = max(slow.held_out)
    loss, seconds = slow.held_out[last], slow.seconds_at(last)
    steps = sorted(fast.held_out)
    for before, after in zip([None, *steps], steps, strict=False):
        if fast.held_out[after] > loss:
            continue
        if before is None:
            return loss, seconds, fast.seconds_at(after)
        share = (fast.held_out[before] - loss) / (fast.held_out[before] - fast.held_out[after])
        return loss, seconds, fast.seconds_at(before + share * (after - before))
    return loss, seconds, None
