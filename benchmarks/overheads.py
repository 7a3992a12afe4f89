"""What sparsity costs before any attention runs: importing the package, hashing, and making a plan.

python benchmarks/overheads.py           JSON to benchmarks/results/overheads-PLATFORM.json
python benchmarks/overheads.py --quick   short sequences, few samples
"""

import argparse
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
IMPORT = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"


def main() -> None:
    """Measures, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(description="Times the import and the planning.")
    parser.add_argument("--quick", action="store_true", help="short sequences, few samples")
    parser.add_argument("--patterns", nargs="+", help="names of what is planned; default all")
    parser.add_argument("--samples", type=int, default=9, help="samples of which the median is taken")
    parser.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/overheads-PLATFORM.json")
    args = parser.parse_args()
    samples = 1 if args.quick else args.samples
    imports = import_seconds(samples, warm_up=not args.quick)
    print("import, seconds: " + ", ".join(f"{name} {seconds:.3f}" for name, seconds in imports.items()) + "\n")
    result = {"environment": environment(), "import_seconds": imports, "shape": f"B1-N{HEADS}-H{HEAD_DIM}", "plans": []}
    print(f"{'ms, medians':<14}{'length':>8}{'eager':>10}{'jit':>10}{'compile':>10}")
    for length in QUICK_LENGTHS if args.quick else LENGTHS:
        for name, (function, operands) in planners(length).items():
            if args.patterns and name not in args.patterns:
                continue
            record = {"pattern": name, "length": length, **_planning(function, operands, samples)}
            result["plans"].append(record)
            eager, jitted = (1e3 * record[x]["median"] for x in ("eager", "jit"))
            print(
                f"{name:<14}{length:>8}{eager:>10.3f}{jitted:>10.3f}{1e3 * record['compile_seconds']:>10.0f}",
                flush=True,
            )
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


def planners(length: int) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Returns for each pattern the function that plans it, and its arguments; hashing apart."""
    rng = np.random.default_rng(length)
    shape, half = (1, length, HEADS), length // 2
    query_bucket, key_bucket = (jnp.asarray(rng.integers(0, BUCKETS, shape, np.int32)) for _ in range(2))
    query_keep, key_keep = (jnp.asarray(rng.random(shape).argsort(axis=1) < half) for _ in range(2))
    documents = jnp.asarray(np.sort(rng.integers(0, BUCKETS, (1, length), np.int32)))
    x = jnp.asarray(rng.standard_normal((*shape, HEAD_DIM), np.float32))

    def qk_sparse(query_keep, key_keep):
        return sfj.qk_sparse(query_keep, key_keep, query_capacity=half, key_capacity=half)

    return {
        "causal": (lambda: sfj.causal(length), ()),
        "packed": (sfj.packed, (documents,)),
        "qk50": (qk_sparse, (query_keep, key_keep)),
        "hash16": (sfj.hash_sparse, (query_bucket, key_bucket)),
        "lsh_buckets": (lambda x, key: sfj.lsh_buckets(x, BUCKETS, key), (x, jax.random.key(0))),
    }


def _planning(function: Callable[..., Any], operands: tuple[Any, ...], samples: int) -> dict[str, Any]:
    jitted = jax.jit(function)
    start = time.perf_counter()
    jitted.lower(*operands).compile()
    return {
        "compile_seconds": time.perf_counter() - start,
        "eager": measure(function, *operands, samples=samples)._asdict(),
        "jit": measure(jitted, *operands, samples=samples)._asdict(),
    }


if __name__ == "__main__":
    main()
