"""Metrics of a run, one JSON record a line: {"kind": "train" | "evaluation" | ..., "step": ..., ...}."""

import json
import math
import os
from pathlib import Path
from typing import Any

from training.errors import writing

# What a run writes once, when it ends: a run that goes on has not ended.
_LAST = ("final", "sample", "end")


class MetricsLog:
    """Appends records to a file.

    Args:
        path: the file; None to write nothing.
        step: going on after this step, records of later steps and of the end are dropped: they will be written again.
    """

    def __init__(self, path: Path | None, step: int):
        self._path = path
        self.training_seconds = 0.0
        """What the records so far say that training has taken."""
        if path is None:
            return
        before = [record for record in read_metrics(path) if record["step"] <= step]
        self.training_seconds = max((record.get("training_seconds", 0.0) for record in before), default=0.0)
        records = [record for record in before if record["kind"] not in _LAST]
        fresh = path.with_suffix(".tmp")
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_text("".join(_line(record) for record in records), "utf-8")
            os.replace(fresh, path)
            self._file = path.open("a", encoding="utf-8")

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Appends a record; a number that is not finite becomes null.

        Raises:
            OutputError: it cannot be written; the records before it are whole.
        """
        if self._path is None:
            return
        with writing(self._path):
            self._file.write(_line({"kind": kind, "step": step, **values}))
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._path is None:
            return
        with writing(self._path):
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a file, without a last line cut short; empty if there is no file."""
    records = []
    for line in path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "kind" in record and "step" in record:
            records.append(record)
    return records


def recent_mean(path: Path, name: str, count: int = 10) -> float:
    """The mean of a value over the last records of training steps that have a finite one; nan if none has."""
    values = [record[name] for record in read_metrics(path) if record["kind"] == "train"][-count:]
    finite = [value for value in values if value is not None]
    return math.fsum(finite) / len(finite) if finite else math.nan


def _line(record: dict[str, Any]) -> str:
    return json.dumps(_finite(record), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
