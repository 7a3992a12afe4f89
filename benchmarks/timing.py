"""How long a call takes: the median over samples, after compilation and a warm-up."""

import contextlib
import fcntl
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import jax

SAMPLE_SECONDS = 0.02  # long against the clock and the dispatch of a call
MOST_CALLS = 20  # in flight together, each holding its outputs
LEAST_SAMPLES = 3


class Timing(NamedTuple):
    """Seconds a call, over `samples` samples of `calls` calls each."""

    median: float
    best: float
    worst: float
    samples: int
    calls: int


def beside() -> AbstractContextManager[None]:
    """While one compiles: others may compile too, and whoever holds `alone()` is waited for."""
    return _held(fcntl.LOCK_SH)


def alone() -> AbstractContextManager[None]:
    """While one is timed: waits until no other process of this machine compiles or is timed, then has them wait."""
    return _held(fcntl.LOCK_EX)


@contextlib.contextmanager
def _held(way: int) -> Iterator[None]:
    with (Path(tempfile.gettempdir()) / f"sparse-flash-jax-timing-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, way)  # closing gives it back
        yield


def measure(function: Callable[..., Any], *args: Any, samples: int, seconds: float = math.inf) -> Timing:
    """Times `function(*args)`, whose outputs are JAX arrays.

    Args:
        function: compiled, or jitted and then compiled by its first call.
        args: of the function.
        samples: of which the median is taken.
        seconds: that they may take together: of calls too long for so many there are fewer samples, but at least
            `LEAST_SAMPLES` where as many are asked for.
    """
    jax.block_until_ready(function(*args))
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    once = time.perf_counter() - start
    calls = min(MOST_CALLS, math.ceil(SAMPLE_SECONDS / once))
    if samples * calls * once > seconds:
        samples = min(samples, max(LEAST_SAMPLES, int(seconds / (calls * once))))
    taken = []
    for _ in range(samples):
        start = time.perf_counter()
        outputs = function(*args)
        for _ in range(calls - 1):
            outputs = function(*args)
        jax.block_until_ready(outputs)
        taken.append((time.perf_counter() - start) / calls)
    return Timing(statistics.median(taken), min(taken), max(taken), samples, calls)
