"""The rows of `sweeps.py` in their file: which of them need not be measured again, and each by what it is of."""

import json
from pathlib import Path
from typing import Any

from environment import ROOT, load_result
from pattern_names import parted

RESULTS = ROOT / "benchmarks" / "results"
SWEEPS, PAPER = RESULTS / "sweeps-gpu.json", RESULTS / "paper-a100.json"
_SAME = ("device", "jax", "commit")  # of rows that may stand in one file

Rows = dict[tuple[str, str, int, int], dict[str, float]]
"""Milliseconds of each part, by method, pattern, heads and length."""


def measured_before(path: Path, environment: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns a file's environment and its rows that are whole; neither if there is no file.

    Rows of which a part failed are to be tried again.

    Raises:
        ValueError: if the file is of another device, version or commit.
    """
    if not path.exists():
        return {}, []
    result = json.loads(path.read_text())
    for name in _SAME:
        before, now = result["environment"][name], environment[name]
        if before != now:
            raise ValueError(
                f"--resume goes on with rows of one {name}: {path} has {before}, this is {now}; "
                "choose another file with --out, or leave --resume out to measure all again."
            )
    return result["environment"], [row for row in result["cases"] if not row["failed"]]


def load_rows(path: Path) -> tuple[dict[str, Any], Rows]:
    """Returns the environment of a file, and what was measured."""
    result = load_result(path)
    rows = {
        (row["method"], row["pattern"], row["heads"], row["length"]): {
            part: 1e3 * seconds["median"] for part, seconds in row["seconds"].items()
        }
        for row in result["cases"]
    }
    return result["environment"], {key: ms for key, ms in rows.items() if ms}


def paper() -> dict[str, Any]:
    """Returns what the paper measured: shape, device and milliseconds of attention alone, and how models trained."""
    return json.loads(PAPER.read_text())


def density(pattern: str) -> float:
    """Returns the share of dense causal attention's pairs that "hash16", "qk50" and their like show, on average."""
    method, number = parted(pattern)
    return 1 / int(number) if method == "hash" else (1 - int(number) / 100) ** 2
