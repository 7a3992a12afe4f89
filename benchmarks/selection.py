"""Which cases run: those of the tests' own list that suit the platform, or those named."""

import fnmatch
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # one list of cases serves tests and benchmarks

from tests.cases import BENCHMARKS, Case
from tests.cases import Shape as Shape
from tests.cases import buckets_pattern as buckets_pattern
from tests.cases import causal as causal
from tests.cases import dropping as dropping

QUICK_LENGTH = 256


def select(names: list[str], platform: str) -> list[Case]:
    """Returns the cases whose names match one of the shell patterns; none given, those of the platform's dtype.

    Raises:
        ValueError: if a pattern matches nothing.
    """
    if not names:
        dtype = "float32" if platform == "cpu" else "bfloat16"
        return [case for case in BENCHMARKS if case.dtype == dtype]
    for name in names:
        if not any(fnmatch.fnmatchcase(str(case), name) for case in BENCHMARKS):
            listed = "\n  ".join(map(str, BENCHMARKS))
            raise ValueError(f"no case is named {name!r}; the cases are\n  {listed}")
    return [case for case in BENCHMARKS if any(fnmatch.fnmatchcase(str(case), name) for name in names)]


def grows(case: Case) -> bool:
    """Whether the case is one of the series that shows how memory grows with length."""
    return case.pattern.name == "hash16" and case.dtype == "float32"
