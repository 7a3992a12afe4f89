"""Which tiles are fastest on this GPU: times candidates for each pass and writes a table that the package can read.

python benchmarks/tune.py                                               JSON to benchmarks/results/
SPARSE_FLASH_TILES=benchmarks/results/tiles-triton.json python ...      runs with what was found

Runs are long, as of a dense causal plan, or short, as of 16 buckets: each has a row of its own for a head dim.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import math
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from environment import environment, written
from passes import make_plan
from selection import Case, Shape, buckets_pattern, causal
from timing import measure

from sparse_flash_jax.kernels.config import FUSED_HEAD_DIM, Blocks, Config, HopperBlocks
from sparse_flash_jax.kernels.implementations import check_implementation, kernels_of

RESULTS = Path(__file__).resolve().parent / "results"
PASSES = ("forward", "dq", "dkv")
FUSED = "backward"  # dQ, dK and dV in one kernel, with a tile of dK/dV
PATTERNS = {True: causal, False: buckets_pattern(16)}  # by whether runs are long
PRINTED = 3  # of each pass, the fastest


class Task(NamedTuple):
    """A pass to be timed with a tile."""

    implementation: str
    dtype: str
    shape: Shape
    long_runs: bool
    name: str
    blocks: Blocks | HopperBlocks
    samples: int


def main() -> None:
    """Measures, prints the fastest, writes JSON."""
    args = _arguments()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # processes share the GPU's memory
    check_implementation(args.implementation, args.dtype, max(args.head_dims))
    rows, timings = [], []
    result = {"environment": environment(), "rows": rows, "timings": timings}
    with written(result, args.out or _default_path(args)), _workers(args.jobs) as pool:
        for head_dim, long_runs in itertools.product(args.head_dims, PATTERNS):
            shape = Shape(B=args.batch, T=args.length, N=args.heads, H=head_dim)
            kind = {"implementation": args.implementation, "dtype": args.dtype}
            kind |= {"head_dim": head_dim, "long_runs": long_runs}
            best = {}
            for name in (*PASSES, FUSED):
                candidates = _candidates(args.implementation, name, head_dim, long_runs=long_runs)
                of_pass = functools.partial(Task, args.implementation, args.dtype, shape, long_runs, name)
                tasks = [of_pass(blocks, args.samples) for blocks in candidates]
                timed = [(seconds, task.blocks) for seconds, task in zip(pool.map(_time, tasks), tasks, strict=True)]
                ranked = sorted((pair for pair in timed if math.isfinite(pair[0])), key=lambda pair: pair[0])
                tried = ({"blocks": dataclasses.asdict(blocks), "seconds": seconds} for seconds, blocks in ranked)
                timings += [kind | {"pass": name} | entry for entry in tried]
                for seconds, blocks in ranked[:PRINTED]:
                    print(
                        f"H{head_dim} {PATTERNS[long_runs].name:<7} {name:<8}{1e3 * seconds:>8.3f} ms  {blocks}",
                        flush=True,
                    )
                if tasks and not ranked:
                    raise RuntimeError(f"no tile of {name} could be compiled and timed at head dim {head_dim}.")
                best[name] = ranked[0] if ranked else (math.inf, None)
            rows.append(kind | _row(best))


def _row(best: dict[str, tuple[float, Any]]) -> dict[str, Any]:
    """The tiles of each pass, and whether one kernel for all gradients beats two."""
    fused = best[FUSED][0] < best["dq"][0] + best["dkv"][0]
    tiles = {name: best[FUSED if fused and name == "dkv" else name][1] for name in PASSES}
    return {name: dataclasses.asdict(blocks) for name, blocks in tiles.items()} | {"fused": fused}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Finds the fastest tiles on this GPU.")
    parser.add_argument("--implementation", choices=("mosaic", "triton"), default="triton")
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 96, 128])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=16_384)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="processes that compile")
    parser.add_argument("--samples", type=int, default=5, help="samples of which the median is taken")
    parser.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/tiles-IMPLEMENTATION.json")
    return parser.parse_args()


def _default_path(args: argparse.Namespace) -> Path:
    return RESULTS / f"tiles-{args.implementation}.json"


def _candidates(implementation: str, name: str, head_dim: int, *, long_runs: bool) -> Iterator[Blocks | HopperBlocks]:
    if implementation == "triton":
        if name != FUSED:
            for rows, columns, warps, stages in itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3)):
                yield Blocks(rows, columns, warps, stages)
        return
    if name == FUSED:
        for stages in (2, 3, 4) if head_dim <= FUSED_HEAD_DIM else ():
            yield HopperBlocks(2, 64, stages, rows_in_registers=True)
        return
    # A program walks through several tiles where runs are short, and takes turns where they are long.
    option = {"forward": "overlap", "dkv": "rows_in_registers"}.get(name)
    columns, tiles = ((64, 128), (1,)) if long_runs else ((64,), (1, 2, 3))
    for sizes in itertools.product((2, 3, 4), columns, (1, 2, 3), tiles, (False, True) if long_runs else (False,)):
        warpgroups, columns_of, stages, tiles_of, turns = sizes
        plain = HopperBlocks(warpgroups, columns_of, stages, tiles=tiles_of, turns=turns)
        yield plain
        if option and stages > 1:
            yield dataclasses.replace(plain, **{option: True})


@contextlib.contextmanager
def _workers(jobs: int) -> Iterator[concurrent.futures.Executor]:
    """Processes that compile side by side, as most of that is Python, and time one at a time."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, context, _start, (context.Lock(),)) as pool:
        yield pool


def _start(lock: Any) -> None:
    global _alone
    _alone = lock


def _time(task: Task) -> float:
    """Seconds a call; infinite where the tile cannot be compiled."""
    with _alone:
        operands = jax.block_until_ready(
            _operands(task.shape, task.dtype, task.long_runs, forward=task.name == "forward")
        )
    kernels = kernels_of(task.implementation)
    passes = {"forward": kernels.forward, "dq": kernels.backward_dq, "dkv": kernels.backward_dkv}
    kernel = kernels.backward if task.name == FUSED else passes[task.name]
    config = Config(task.blocks, task.blocks, task.blocks, fused=task.name == FUSED)
    function = jax.jit(functools.partial(kernel, scale=task.shape.H**-0.5, config=config))
    try:
        call = function.lower(*operands).compile()
        with _alone:
            return measure(call, *operands, samples=task.samples).median
    except Exception as error:  # too much shared memory, or a shape that the backend cannot do
        print(f"{task.name} {task.blocks}: {str(error).splitlines()[0][:120]}", flush=True)
        return math.inf


@functools.lru_cache(maxsize=1)
def _operands(shape: Shape, dtype: str, long_runs: bool, *, forward: bool) -> tuple[Any, ...]:
    case = Case(shape, PATTERNS[long_runs], dtype)
    arrays = {name: jnp.asarray(x) for name, x in case.arrays().items()}
    runs = jax.jit(lambda arrays: make_plan(case, arrays))(arrays).runs
    draw = lambda seed: jax.random.normal(jax.random.key(seed), (shape.B, shape.N, shape.T, shape.H), jnp.dtype(dtype))
    q, k, v, do = map(draw, range(4))
    row = jnp.zeros(q.shape[:3], jnp.float32)
    return (q, k, v, runs) if forward else (q, k, v, runs, row, do, row)


if __name__ == "__main__":
    main()
