"""Wall time by density and length: hash buckets and dropping, whole calls, beside dense attention in the same run.

python benchmarks/density.py            the device's lengths; JSON to benchmarks/results/
python benchmarks/density.py --quick    one tiny length, to see that it runs
"""

import argparse
from pathlib import Path
from typing import Any

import jax
from environment import environment, written
from passes import Call, dense_calls, make_plan, whole_calls
from selection import QUICK_LENGTH, Case, Shape, buckets_pattern, dropping
from timing import measure

RESULTS = Path(__file__).resolve().parent / "results"
BUCKETS = (1, 2, 4, 8, 16, 32, 64)
DROPPED = (0, 10, 20, 30, 40, 50, 60, 70, 80)  # percent of queries, and of keys
GPU_LENGTHS = (2048, 4096, 8192, 16_384, 32_768, 65_536)
CPU_LENGTHS = (2048, 4096)
GPU_TOKENS = 32_768  # of a batch; a longer sequence comes alone
HEADER = f"{'pattern':<10}{'density':>9}{'fwd':>9}{'f+b':>9}{'x fwd':>8}{'x f+b':>8}"


def main() -> None:
    """Measures, prints a table a length, writes JSON."""
    args = _arguments()
    platform = jax.default_backend()
    lengths = (QUICK_LENGTH,) if args.quick else args.lengths or (CPU_LENGTHS if platform == "cpu" else GPU_LENGTHS)
    samples = 1 if args.quick else args.samples
    result: dict[str, Any] = {"environment": environment(), "cases": []}
    with written(result, args.out or (None if args.quick else RESULTS / f"density-{platform}.json")):
        for length in lengths:
            cases = _cases(length, platform)
            dense = _times(dense_calls(cases[0], "xla" if platform == "cpu" else "cudnn"), samples)
            print(f"\n{cases[0].shape}: ms, whole calls; x: dense over sparse\n{HEADER}")
            print(f"{'dense':<19}{dense['dense_forward'] * 1e3:>9.3f}{dense['dense_forward_backward'] * 1e3:>9.3f}")
            for case in cases:
                result["cases"].append(_record(case, dense, args.implementation, samples))
                print(_row(case, result["cases"][-1]), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Times sparse attention by density and length.")
    parser.add_argument("--quick", action="store_true", help="one tiny length, one sample")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of a sequence; default those of the device")
    parser.add_argument("--samples", type=int, default=5, help="samples of which the median is taken")
    parser.add_argument("--implementation", help='"mosaic", "triton" or "xla"; default picks for the device')
    parser.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/density-PLATFORM.json")
    return parser.parse_args()


def _cases(length: int, platform: str) -> list[Case]:
    patterns = [buckets_pattern(count) for count in BUCKETS] + [dropping(percent, length) for percent in DROPPED]
    if platform == "cpu":
        return [Case(Shape(B=1, T=length, N=4, H=64), pattern) for pattern in patterns]
    shape = Shape(B=max(1, GPU_TOKENS // length), T=length, N=12, H=64)
    return [Case(shape, pattern, "bfloat16") for pattern in patterns]


def _times(calls: dict[str, Call], samples: int) -> dict[str, float]:
    return {name: measure(call.function, *call.args, samples=samples).median for name, call in calls.items()}


def _record(case: Case, dense: dict[str, float], implementation: str | None, samples: int) -> dict[str, Any]:
    calls = whole_calls(case, implementation)
    seconds = _times(calls, samples)
    return {
        "case": str(case),
        "density": float(make_plan(case, calls["forward"].args[0]).density()),
        "seconds": seconds | dense,
        "speedup": {name: dense[f"dense_{name}"] / seconds[name] for name in seconds},
    }


def _row(case: Case, record: dict[str, Any]) -> str:
    cells = [f"{case.pattern.name:<10}{record['density']:>9.4f}"]
    cells += [f"{record['seconds'][name] * 1e3:>9.3f}" for name in ("forward", "forward_backward")]
    cells += [f"{record['speedup'][name]:>8.2f}" for name in ("forward", "forward_backward")]
    return "".join(cells)


if __name__ == "__main__":
    main()
