"""Which tiles are fastest on this GPU: times candidates for each pass and writes a table that the package can read.

python benchmarks/tune.py                                               JSON to benchmarks/results/
SPARSE_FLASH_TILES=benchmarks/results/tiles-triton.json python ...      runs with what was found

Runs are long, as of a dense causal plan, or short, as of 16 buckets: each has a row of its own for a head dim.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from environment import environment, written
from passes import make_plan
from selection import Case, Shape, buckets_pattern, causal
from timing import measure

from sparse_flash_jax.kernels.config import Blocks, Config, HopperBlocks
from sparse_flash_jax.kernels.implementations import check_implementation, kernels_of
from sparse_flash_jax.kernels.tiles import Runs

RESULTS = Path(__file__).resolve().parent / "results"
PASSES = ("forward", "dq", "dkv")
PATTERNS = {True: causal, False: buckets_pattern(16)}  # by whether runs are long
PRINTED = 3  # of each pass, the fastest


def main() -> None:
    """Measures, prints the fastest, writes JSON."""
    args = _arguments()
    check_implementation(args.implementation, args.dtype, max(args.head_dims))
    rows, timings = [], []
    with written({"environment": environment(), "rows": rows, "timings": timings}, args.out or _default_path(args)):
        for head_dim, long_runs in itertools.product(args.head_dims, PATTERNS):
            shape = Shape(B=args.batch, T=args.length, N=args.heads, H=head_dim)
            case = Case(shape, PATTERNS[long_runs], args.dtype)
            kind = {"implementation": args.implementation, "dtype": args.dtype}
            kind |= {"head_dim": head_dim, "long_runs": long_runs}
            best = {}
            for name in PASSES:
                ranked = sorted(_times(case, name, args), key=lambda pair: pair[1])
                tried = ({"blocks": dataclasses.asdict(blocks), "seconds": seconds} for blocks, seconds in ranked)
                timings += [kind | {"pass": name} | entry for entry in tried]
                for blocks, seconds in ranked[:PRINTED]:
                    print(f"H{head_dim} {case.pattern.name:<7} {name:<8}{1e3 * seconds:>8.3f} ms  {blocks}", flush=True)
                best[name] = dataclasses.asdict(ranked[0][0])
            rows.append(kind | best)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Finds the fastest tiles on this GPU.")
    parser.add_argument("--implementation", choices=("mosaic", "triton"), default="triton")
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 96, 128])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=16_384)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--samples", type=int, default=5, help="samples of which the median is taken")
    parser.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/tiles-IMPLEMENTATION.json")
    return parser.parse_args()


def _default_path(args: argparse.Namespace) -> Path:
    return RESULTS / f"tiles-{args.implementation}.json"


def _candidates(implementation: str, name: str) -> Iterator[Blocks | HopperBlocks]:
    if implementation == "triton":
        for rows, columns, warps, stages in itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3)):
            yield Blocks(rows, columns, warps, stages)
        return
    option = {"forward": "overlap", "dkv": "rows_in_registers"}.get(name)
    for columns, warpgroups, tiles, turns in itertools.product((64, 128), (2, 3, 4), (1, 2, 4), (False, True)):
        for stages in (1, 2, 3):
            plain = HopperBlocks(warpgroups, columns, stages, tiles=tiles, turns=turns)
            yield plain
            if option and stages > 1:
                yield dataclasses.replace(plain, **{option: True})


def _times(case: Case, name: str, args: argparse.Namespace) -> list[tuple[Any, float]]:
    """Times the candidates that compile, compiled several at once and run one by one."""
    arrays = {name: jnp.asarray(x) for name, x in case.arrays().items()}
    runs = jax.jit(lambda arrays: make_plan(case, arrays))(arrays).runs
    operands = _operands(case.shape, args.dtype, runs, name)
    kernels = kernels_of(args.implementation)
    kernel = {"forward": kernels.forward, "dq": kernels.backward_dq, "dkv": kernels.backward_dkv}[name]

    def compiled(blocks: Any) -> Any:
        config = Config(blocks, blocks, blocks)
        function = jax.jit(functools.partial(kernel, scale=case.shape.H**-0.5, config=config))
        try:
            return function.lower(*operands).compile()
        except Exception as error:  # too much shared memory, or a shape that the backend cannot do
            print(f"{name} {blocks}: {str(error).splitlines()[0][:120]}", flush=True)
            return None

    candidates = list(_candidates(args.implementation, name))
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        calls = list(pool.map(compiled, candidates))
    return [
        (blocks, measure(call, *operands, samples=args.samples).median)
        for blocks, call in zip(candidates, calls, strict=True)
        if call is not None
    ]


def _operands(shape: Shape, dtype: str, runs: Runs, name: str) -> tuple[Any, ...]:
    draw = lambda seed: jax.random.normal(jax.random.key(seed), (shape.B, shape.N, shape.T, shape.H), jnp.dtype(dtype))
    q, k, v, do = map(draw, range(4))
    row = jnp.zeros(q.shape[:3], jnp.float32)
    return (q, k, v, runs) if name == "forward" else (q, k, v, runs, row, do, row)


if __name__ == "__main__":
    main()
