"""What sparsity costs before any attention runs: importing the package, hashing, and making a plan.

python benchmarks/overheads.py                              JSON to benchmarks/results/overheads-PLATFORM.json
python benchmarks/overheads.py --heads 12 --lengths 1048576 of as many heads, at this length
python benchmarks/overheads.py --quick                      short sequences, few samples

`eager` and `jit` are calls of their own, which on a GPU wait for the host to launch kernels; `together` is a plan's
share of one call that makes several, as a model does, where the device is what takes the time.
"""

import argparse
import functools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from environment import environment, write
from timing import measure

import sparse_flash_jax as sfj

RESULTS = Path(__file__).resolve().parent / "results"
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
QUICK_LENGTHS = (256,)  # to see that it runs
HEADS, HEAD_DIM, BUCKETS = 4, 64, 16
TOGETHER = 4  # plans of a call
IMPORT = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"


def main() -> None:
    """Measures, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(description="Times the import and the planning.")
    parser.add_argument("--quick", action="store_true", help="short sequences, few samples")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--heads", type=int, default=HEADS, help="query and key heads")
    parser.add_argument("--patterns", nargs="+", help="names of what is planned; default all")
    parser.add_argument("--samples", type=int, default=9, help="samples of which the median is taken")
    parser.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/overheads-PLATFORM.json")
    args = parser.parse_args()
    samples = 1 if args.quick else args.samples
    imports = import_seconds(samples, warm_up=not args.quick)
    print("import, seconds: " + ", ".join(f"{name} {seconds:.3f}" for name, seconds in imports.items()) + "\n")
    shape = f"B{args.batch}-N{args.heads}-H{HEAD_DIM}"
    result = {"environment": environment(), "import_seconds": imports, "shape": shape, "plans": []}
    print(f"{'ms, medians':<14}{'length':>8}{'eager':>10}{'jit':>10}{'together':>10}{'compile':>10}")
    for length in QUICK_LENGTHS if args.quick else args.lengths:
        for name, (function, operands) in planners(args.batch, length, args.heads).items():
            if args.patterns and name not in args.patterns:
                continue
            record = {"pattern": name, "length": length, **_planning(function, operands, samples)}
            result["plans"].append(record)
            cells = [f"{1e3 * record[x]['median']:>10.3f}" for x in ("eager", "jit", "together")]
            print(f"{name:<14}{length:>8}{''.join(cells)}{1e3 * record['compile_seconds']:>10.0f}", flush=True)
    out = args.out or (None if args.quick else RESULTS / f"overheads-{jax.default_backend()}.json")
    if out:
        write(result, out)


def import_seconds(samples: int, *, warm_up: bool) -> dict[str, float]:
    """Returns the median time of importing JAX alone, and the package (JAX included), in fresh interpreters."""
    names = ("jax", "sparse_flash_jax")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(samples + warm_up):  # alternating, so that a busy moment falls on both
        for name in names:
            command = [sys.executable, "-c", IMPORT.format(name)]
            seconds[name].append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    medians = {name: statistics.median(seconds[name][warm_up:]) for name in names}
    return {**medians, "difference": medians["sparse_flash_jax"] - medians["jax"]}


def planners(batch: int, length: int, heads: int) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Returns for each pattern the function that plans it, and its arguments; hashing apart."""
    rng = np.random.default_rng(length)
    shape, half = (batch, length, heads), length // 2
    query_bucket, key_bucket = (jnp.asarray(rng.integers(0, BUCKETS, shape, np.int32)) for _ in range(2))
    query_keep, key_keep = (jnp.asarray(rng.random(shape).argsort(axis=1) < half) for _ in range(2))
    documents = jnp.asarray(np.sort(rng.integers(0, BUCKETS, (batch, length), np.int32), axis=1))
    x = jnp.asarray(rng.standard_normal((*shape, HEAD_DIM), np.float32))

    def qk_sparse(query_keep, key_keep):
        return sfj.qk_sparse(query_keep, key_keep, query_capacity=half, key_capacity=half)

    return {
        "causal": (lambda: sfj.causal(length), ()),
        "packed": (sfj.packed, (documents,)),
        "qk50": (qk_sparse, (query_keep, key_keep)),
        "hash16": (sfj.hash_sparse, (query_bucket, key_bucket)),
        "hash16_known": (functools.partial(sfj.hash_sparse, num_buckets=BUCKETS), (query_bucket, key_bucket)),
        "lsh_buckets": (lambda x, key: sfj.lsh_buckets(x, BUCKETS, key), (x, jax.random.key(0))),
    }


def _planning(function: Callable[..., Any], operands: tuple[Any, ...], samples: int) -> dict[str, Any]:
    jitted = jax.jit(function)
    # Rolled, so that no two are the same; by the host, so that rolling costs the call nothing.
    several = [jax.tree.map(lambda x, by=by: _rolled(x, by), operands) for by in range(TOGETHER)]
    together = measure(jax.jit(lambda several: [function(*each) for each in several]), several, samples=samples)
    each = {name: getattr(together, name) / TOGETHER for name in ("median", "best", "worst")}
    start = time.perf_counter()
    jitted.lower(*operands).compile()
    return {
        "compile_seconds": time.perf_counter() - start,
        "eager": measure(function, *operands, samples=samples)._asdict(),
        "jit": measure(jitted, *operands, samples=samples)._asdict(),
        "together": together._replace(**each)._asdict(),
    }


def _rolled(x: jax.Array, by: int) -> jax.Array:
    return x if x.ndim < 2 else jnp.roll(x, by, axis=1)


if __name__ == "__main__":
    main()
