"""The package's table of expected time shares, out of the results of `density.py`."""

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from environment import ROOT

PACKAGE = ROOT / "sparse_flash_jax" / "time_shares.json"
_CASE = re.compile(r"-T(?P<length>\d+)-.*-(?P<pattern>causal|(?P<method>hash|qk)\d+)-\w+$")


def package_table(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns each device's environment and its time shares by length, method and density."""
    table = {}
    for result in results:
        kind = result["environment"]["device"].split(" x ", 1)[1]
        table[kind] = {"environment": result["environment"], "lengths": _rows(result["cases"])}
    return table


def _rows(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each length."""
    by_length: dict[int, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: {"hash": [], "qk": []})
    own_dense: dict[int, float] = {}
    for case in cases:
        named = _CASE.search(case["case"])
        if named is None:
            raise ValueError(f"{case['case']} is no case of benchmarks/density.py.")
        length = int(named["length"])
        density, share = (float(f"{x:.4g}") for x in (case["density"], 1 / case["speedup"]["forward_backward"]))
        if named["method"]:
            by_length[length][named["method"]].append((density, share))
        else:
            own_dense[length] = share
    return [
        {"length": length, "own_dense": own_dense[length]} | {method: sorted(rows) for method, rows in methods.items()}
        for length, methods in sorted(by_length.items())
    ]


def write_package_table(results: Path, out: Path = PACKAGE) -> None:
    """Writes the table out of the results of every platform."""
    measured = [json.loads(path.read_text()) for path in sorted(results.glob("density-*.json"))]
    # A row a line: short, and a change of one figure is one line.
    text = json.dumps(package_table(measured), indent=1)
    text = re.sub(r"\[\s+([\d.e-]+),\s+([\d.e-]+)\s+\]", r"[\1, \2]", text)
    out.write_text(text + "\n")
    print(f"written to {out}")
