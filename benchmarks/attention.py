"""How fast sparse attention is: against dense attention in the same run, and where its time goes.

python benchmarks/attention.py                      every case of this device; JSON to benchmarks/results/
python benchmarks/attention.py --cases '*hash16*'   those whose names match
python benchmarks/attention.py --quick              tiny lengths, to see that it runs
"""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from environment import environment, written
from memory import memory, shortened
from passes import Call, dense_calls, forward_tiles, make_plan, matmul_call, memory_bytes, mha_calls, sparse_calls
from selection import QUICK_LENGTH, Case, grows, select
from timing import Timing, measure

RESULTS = Path(__file__).resolve().parent / "results"
# For a visible pair and unit of head dim: q k^T and p v at two FLOPs each, and five such products in the backward pass.
FORWARD_FLOPS, FORWARD_BACKWARD_FLOPS = 4, 14
MHA_BACKWARD_SIDES = (32, 64, 128)  # the first is the default of JAX's kernel; the best counts
DENSE_ARRAYS = 4  # [B N T S] arrays in float32 that dense forward + backward on a CPU holds, by the compiler's plan


class Baseline(NamedTuple):
    """Dense attention on a case's tensors."""

    times: dict[str, Timing]
    memory: dict[str, int]
    """Of forward and backward."""


def main() -> None:
    """Measures, prints a table, writes JSON."""
    args = _arguments()
    platform = jax.default_backend()
    cases = select(args.cases, platform)
    if args.list:
        print(*cases, sep="\n")
        return
    length = QUICK_LENGTH if args.quick else None
    measured = [shortened(case, length) for case in cases]
    samples = 1 if args.quick else args.samples
    rates = {dtype: _matmul_rate(dtype, platform, args.quick) for dtype in sorted({case.dtype for case in cases})}
    result = {"environment": environment(), "matmul_tflops": rates, "cases": [], "memory": []}
    with written(result, args.out or (None if args.quick else RESULTS / f"attention-{platform}.json")):
        print(_HEADER)
        for case, baseline in _with_baselines(measured, platform, samples, mha=not args.no_mha):
            result["cases"].append(_record(case, baseline, args.implementation, samples))
            print(_row(result["cases"][-1]), flush=True)
        if platform == "cpu" and sys.platform == "linux" and not args.no_memory:
            series = [case for case in cases if grows(case)]
            print("\n" + _MEMORY_HEADER)
            for case in series[:1] if args.quick else series:
                result["memory"].append(memory(case, length, args.implementation))
                print(_memory_row(result["memory"]), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Times sparse attention against dense attention.")
    parser.add_argument("--cases", nargs="+", default=[], help="names or shell patterns; default those of the device")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    parser.add_argument("--quick", action="store_true", help="tiny lengths, one sample")
    parser.add_argument("--samples", type=int, default=5, help="samples of which the median is taken")
    parser.add_argument("--implementation", help='"mosaic", "triton" or "xla"; default picks for the device')
    parser.add_argument("--no-mha", action="store_true", help="leave out JAX's Pallas-Triton mha: half a minute a case")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory by length (CPU on Linux only)")
    parser.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/attention-PLATFORM.json")
    return parser.parse_args()


def _matmul_rate(dtype: str, platform: str, quick: bool) -> float:
    """TFLOP/s of a square product: what no kernel of this dtype can pass."""
    size = QUICK_LENGTH if quick else 2048 if platform == "cpu" else 8192
    call = matmul_call(dtype, size)
    return 2 * size**3 / measure(call.function, *call.args, samples=5).median / 1e12


def _with_baselines(
    cases: list[Case], platform: str, samples: int, *, mha: bool
) -> Iterator[tuple[Case, Baseline | str]]:
    """Times dense attention once for each shape and dtype, and gives it with each case."""
    baselines: dict[tuple, Baseline | str] = {}
    for case in cases:
        tensors = (case.shape, case.dtype)
        if tensors not in baselines:
            baselines[tensors] = _dense(case, platform, samples)
        baseline = baselines[tensors]
        if mha and case.pattern.name == "causal" and platform == "gpu" and isinstance(baseline, Baseline):
            baseline = baseline._replace(times=baseline.times | _mha(case, samples))
        yield case, baseline


def _dense(case: Case, platform: str, samples: int) -> Baseline | str:
    """Times dense attention on the case's tensors, or says why not."""
    s = case.shape
    needed = DENSE_ARRAYS * 4 * s.B * s.N * s.T * s.keys
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if platform == "cpu" and needed > free / 2:
        return f"not run: needs about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free"
    implementation = "xla" if platform == "cpu" or case.dtype == "float32" else "cudnn"
    calls = dense_calls(case, implementation)
    return Baseline(_timed(calls, samples), memory_bytes(calls["dense_forward_backward"].compile()))


def _mha(case: Case, samples: int) -> dict[str, Timing]:
    """Times JAX's own Pallas-Triton kernels with the backward tiles that suit them best; nothing where none run."""
    best: dict[str, Timing] = {}
    for side in MHA_BACKWARD_SIDES:
        for name, call in mha_calls(case, side).items():
            try:
                timing = measure(call.function, *call.args, samples=samples)
            except (jax.errors.JaxRuntimeError, ValueError) as error:  # more shared memory than there is
                print(f"{case}: {name} with backward tiles of {side}: {str(error).splitlines()[0][:120]}")
            else:
                best[name] = min(timing, best.get(name, timing))
    return best


def _timed(calls: dict[str, Call], samples: int) -> dict[str, Timing]:
    return {name: measure(call.function, *call.args, samples=samples) for name, call in calls.items()}


def _record(case: Case, dense: Baseline | str, implementation: str | None, samples: int) -> dict[str, Any]:
    """Times a case and relates the times to the work and to the baseline."""
    shape = case.shape
    calls = sparse_calls(case, implementation)
    times = _timed(calls, samples)
    plan = make_plan(case, calls["plan"].args[0])
    stats = forward_tiles(plan, case.dtype, shape.H, implementation)
    pairs = stats.visible_pairs * (shape.B * shape.N // stats.heads)
    baseline = dense.times if isinstance(dense, Baseline) else {}
    dense_memory = {"dense_forward_backward": dense.memory} if isinstance(dense, Baseline) else {}

    def tflops(name: str) -> float:
        flops = FORWARD_BACKWARD_FLOPS if name.endswith("backward") else FORWARD_FLOPS
        return flops * pairs * shape.H / times[name].median / 1e12

    return {
        "case": str(case),
        "visible_pairs": pairs,
        "density": stats.density,
        "tiles": {
            "block_q": stats.block_q,
            "block_k": stats.block_k,
            "executed": stats.executed_tiles,
            "full": stats.full_tiles,
            "total": stats.total_tiles,
            "efficiency": stats.tile_efficiency,
        },
        "seconds": {name: timing._asdict() for name, timing in {**times, **baseline}.items()},
        "dense": "measured" if baseline else dense,
        "useful_tflops": {name: tflops(name) for name in times if name.split("_")[0] in ("kernel", "forward")},
        "speedup": {
            name: baseline[f"dense_{name}"].median / times[name].median
            for name in ("forward", "forward_backward")
            if baseline
        },
        "memory_bytes": {"forward_backward": memory_bytes(calls["forward_backward"].compile())} | dense_memory,
    }


_COLUMNS = ("plan", "gather", "kernel_forward", "kernel_forward_backward", "forward", "forward_backward")
_HEADER = (
    "ms, medians; plan, gather and kernels by themselves, then the whole call; TFLOP/s of visible pairs and\n"
    "peak MiB of forward + backward, whole call\n"
    f"{'case':<36}{'plan':>8}{'gather':>8}{'k fwd':>9}{'k f+b':>9}{'fwd':>9}{'f+b':>9}{'hash f+b':>10}"
    f"{'dense f':>9}{'dense f+b':>10}"
    f"{'x fwd':>7}{'x f+b':>7}{'mha f':>9}{'mha f+b':>9}{'TFLOP/s':>9}{'tiles':>7}{'MiB':>8}{'dense':>8}"
)


def _row(record: dict[str, Any]) -> str:
    ms = {name: 1e3 * timing["median"] for name, timing in record["seconds"].items()}
    cells = [f"{record['case']:<36}"]
    widths = (8, 8, 9, 9, 9, 9)
    cells += [f"{ms[name]:>{width}.2f}" for name, width in zip(_COLUMNS, widths, strict=True)]
    optional = (("hashed_forward_backward", 10, 2), ("dense_forward", 9, 1), ("dense_forward_backward", 10, 1))
    for name, width, digits in optional:
        cells.append(f"{ms[name]:>{width}.{digits}f}" if name in ms else f"{'-':>{width}}")
    for name in ("forward", "forward_backward"):
        cells.append(f"{record['speedup'][name]:>7.2f}" if record["speedup"] else f"{'-':>7}")
    for name in ("mha_forward", "mha_forward_backward"):
        cells.append(f"{ms[name]:>9.2f}" if name in ms else f"{'-':>9}")
    cells.append(f"{record['useful_tflops']['forward_backward']:>9.3g}")
    cells.append(f"{record['tiles']['efficiency']:>7.2f}")
    for name in ("forward_backward", "dense_forward_backward"):
        memory = record["memory_bytes"].get(name)
        cells.append(f"{memory['peak'] / 2**20:>8.0f}" if memory else f"{'-':>8}")
    return "".join(cells)


_MEMORY_HEADER = (
    "MiB, forward + backward; x: over the row above\n"
    f"{'length':>8}{'peak RSS growth':>17}{'x':>6}{'temporaries':>13}{'x':>6}{'outputs':>9}{'dense temporaries':>19}"
)


def _memory_row(series: list[dict[str, Any]]) -> str:
    last, before = series[-1], series[-2] if len(series) > 1 else None
    cells = [f"{last['length']:>8}"]
    for name, width in (("peak_rss_growth_bytes", 17), ("temporary_bytes", 13)):
        cells.append(f"{last[name] / 2**20:>{width}.1f}")
        cells.append(f"{last[name] / before[name]:>6.2f}" if before and before[name] else f"{'':>6}")
    cells.append(f"{last['output_bytes'] / 2**20:>9.1f}{last['dense_temporary_bytes'] / 2**20:>19.1f}")
    return "".join(cells)


if __name__ == "__main__":
    main()
