"""Time and memory by density and length: buckets and dropping, whole calls, beside dense attention in the same run.

python benchmarks/density.py              the device's lengths; JSON to benchmarks/results/
python benchmarks/density.py --quick      one tiny length, to see that it runs
python benchmarks/density.py --package    measures nothing: what results/density-*.json hold becomes the package's own
                                          table, by which `expected_time_share` and `Auto` go
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
from environment import environment, written
from passes import Call, dense_calls, make_plan, memory_bytes, whole_calls
from selection import QUICK_LENGTH, Case, Shape, buckets_pattern, causal, dropping
from time_shares import PACKAGE, write_package_table
from timing import measure

RESULTS = Path(__file__).resolve().parent / "results"
BUCKETS = (1, 2, 4, 8, 16, 32, 64)
DROPPED = (0, 10, 20, 30, 40, 50, 60, 70, 80)  # percent of queries, and of keys
GPU_LENGTHS = (1024, 2048, 4096, 8192, 16_384, 32_768, 65_536)
CPU_LENGTHS = (256, 512, 1024, 2048, 4096)
PASSES = ("forward", "forward_backward")
GPU_TOKENS = 32_768  # of a batch; a longer sequence comes alone
HEADER = f"{'pattern':<10}{'density':>9}{'fwd':>9}{'f+b':>9}{'x fwd':>8}{'x f+b':>8}{'MiB f+b':>9}"

Compiled = dict[str, tuple[jax.stages.Compiled, tuple[Any, ...]]]
"""A compiled function and its arguments, of each call by its name."""

Measured = dict[str, dict[str, Any]]
"""Seconds and memory_bytes, of each call by its name."""


def main() -> None:
    """Measures, prints a table a length, writes JSON."""
    args = _arguments()
    if args.package:
        write_package_table(RESULTS, args.out or PACKAGE)
        return
    platform = jax.default_backend()
    lengths = (QUICK_LENGTH,) if args.quick else args.lengths or (CPU_LENGTHS if platform == "cpu" else GPU_LENGTHS)
    samples = 1 if args.quick else args.samples
    result: dict[str, Any] = {"environment": environment(), "cases": []}
    with written(result, args.out or (None if args.quick else RESULTS / f"density-{platform}.json")):
        for length in lengths:
            cases = _cases(length, platform, args.patterns)
            dense_compiled, compiled = _compiled(cases, "xla" if platform == "cpu" else "cudnn", args.implementation)
            dense = _measured(dense_compiled, samples)
            print(f"\n{cases[0].shape}: ms, whole calls; x: dense over sparse; MiB: peak\n{HEADER}")
            print(_dense_row(dense))
            for case, calls in zip(cases, compiled, strict=True):
                result["cases"].append(_record(case, calls, dense, samples))
                print(_row(case, result["cases"][-1]), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Times sparse attention by density and length.")
    parser.add_argument("--quick", action="store_true", help="one tiny length, one sample")
    parser.add_argument("--package", action="store_true", help="write the package's table from results; no measuring")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of a sequence; default those of the device")
    parser.add_argument("--patterns", nargs="+", help="causal, hash16, qk30 and so on; default all")
    parser.add_argument("--samples", type=int, default=5, help="samples of which the median is taken")
    parser.add_argument("--implementation", help='"mosaic", "triton" or "xla"; default picks for the device')
    parser.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/density-PLATFORM.json")
    return parser.parse_args()


def _cases(length: int, platform: str, names: list[str] | None) -> list[Case]:
    patterns = [causal, *map(buckets_pattern, BUCKETS), *(dropping(percent, length) for percent in DROPPED)]
    unknown = {*(names or ())} - {pattern.name for pattern in patterns}
    if unknown:
        raise SystemExit(f"no pattern is named {sorted(unknown)}, but {[pattern.name for pattern in patterns]}")
    patterns = [pattern for pattern in patterns if names is None or pattern.name in names]
    if platform == "cpu":
        return [Case(Shape(B=1, T=length, N=4, H=64), pattern) for pattern in patterns]
    shape = Shape(B=max(1, GPU_TOKENS // length), T=length, N=12, H=64)
    return [Case(shape, pattern, "bfloat16") for pattern in patterns]


def _compiled(cases: list[Case], dense: Literal["xla", "cudnn"], sparse: str | None) -> tuple[Compiled, list[Compiled]]:
    """Calls of dense attention, and those of each case: compiled side by side, before anything is timed."""
    calls = [dense_calls(cases[0], dense), *(whole_calls(case, sparse) for case in cases)]

    def compiled(calls: dict[str, Call]) -> Compiled:
        return {name: (call.compile(), call.args) for name, call in calls.items()}

    with ThreadPoolExecutor() as threads:
        first, *others = threads.map(compiled, calls)
    return first, others


def _measured(calls: Compiled, samples: int) -> Measured:
    """Seconds and bytes of each call."""
    seconds = {name: measure(call, *args, samples=samples).median for name, (call, args) in calls.items()}
    return {"seconds": seconds, "memory_bytes": {name: memory_bytes(call) for name, (call, _) in calls.items()}}


def _record(case: Case, calls: Compiled, dense: Measured, samples: int) -> dict[str, Any]:
    sparse = _measured(calls, samples)
    arrays, *_ = calls["forward"][1]
    return {
        "case": str(case),
        "density": float(make_plan(case, arrays).density()),
        **{quantity: sparse[quantity] | dense[quantity] for quantity in sparse},
        "speedup": {name: dense["seconds"][f"dense_{name}"] / sparse["seconds"][name] for name in calls},
    }


def _dense_row(dense: Measured) -> str:
    cells = [f"{'dense':<19}"]
    cells += [f"{dense['seconds'][f'dense_{name}'] * 1e3:>9.3f}" for name in PASSES]
    return "".join(cells) + f"{'':>16}{dense['memory_bytes']['dense_forward_backward']['peak'] / 2**20:>9.1f}"


def _row(case: Case, record: dict[str, Any]) -> str:
    cells = [f"{case.pattern.name:<10}{record['density']:>9.4f}"]
    cells += [f"{record['seconds'][name] * 1e3:>9.3f}" for name in PASSES]
    cells += [f"{record['speedup'][name]:>8.2f}" for name in PASSES]
    return "".join(cells) + f"{record['memory_bytes']['forward_backward']['peak'] / 2**20:>9.1f}"


if __name__ == "__main__":
    main()
