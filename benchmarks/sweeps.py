"""The paper's run-time sweeps: time by length, buckets and dropped shares, beside dense, masked and FlexAttention.

python benchmarks/sweeps.py                        all of it; JSON to benchmarks/results/, row by row
python benchmarks/sweeps.py --draw docs            and its figures into that folder
python benchmarks/sweeps.py --resume               goes on with the rows that the file has, of this commit and device
python benchmarks/sweeps.py --lengths 32768 --heads 48 --methods dense sparse
python benchmarks/sweeps.py --quick                tiny lengths, to see that it runs, on a CPU too

Thousands of kernels take long to compile: `--processes` do it side by side, then time one after the other.
`plot.py` draws the same figures, and makes the tables.
"""

import argparse
import contextlib
import itertools
import time
from pathlib import Path
from typing import Any

from environment import environment, written
from flex_process import has_torch
from plot_sweeps import draw_sweeps
from sweep_cases import BATCH, FLEX_LENGTHS, HEAD_DIM, HEADS, LENGTHS, METHODS, PARTS, SweepCase, sweep_cases
from sweep_results import RESULTS, measured_before
from sweep_workers import FlexCases, Options, Record, Workers, in_this_process, probed

QUICK = {"lengths": (64,), "heads": (1, 2), "batch": 1, "head_dim": 16, "dtype": "float32"}
QUICK_PATTERNS = ("hash2", "hash16", "qk50")
HEADER = f"ms, medians; failed and left-out parts say why\n{'case':<46}{'fwd':>10}{'bwd':>10}{'f+b':>10}{'mask':>9}"


def main() -> None:
    """Measures, prints a row a case, writes JSON."""
    args = _arguments()
    began = time.monotonic()
    described = environment() if args.processes == 1 else probed()
    platform = described["platform"]
    path = args.out or (None if args.quick else RESULTS / f"sweeps-{platform}.json")
    before, rows = measured_before(path, described) if args.resume and path else ({}, [])
    cases = _remaining(args, rows)
    out = [case for case in cases if case.left_out]
    no_flex = _why_no_flex(platform)
    flex = [case for case in cases if case.method == "flex" and no_flex is None]
    others = [case for case in cases if case.method != "flex" and not case.left_out]
    result: dict[str, Any] = {"environment": before | described, "flex_attention": no_flex, "cases": rows}
    options = Options(1 if args.quick else args.samples, args.implementation, "xla" if platform == "cpu" else "cudnn")
    with written(result, path) as keep, contextlib.ExitStack() as closing:
        print(HEADER)
        for case in out:
            rows.append(_row(case, {"seconds": {}, "failed": {}, "left_out": case.left_out}))
        flexed = closing.enter_context(contextlib.closing(FlexCases(flex)))
        if args.processes == 1:
            records = in_this_process(others, options)
        else:
            workers = closing.enter_context(contextlib.closing(Workers(others, options, args.processes)))
            records = workers.records()
            for nth, said in enumerate(workers.compiled(), 1):
                print(f"after {time.monotonic() - began:.0f} s, process {nth}: {said}", flush=True)
        for case, record in itertools.chain(flexed.records(options.samples), records):
            rows.append(_row(case, record))
            result["environment"] |= flexed.versions
            print(_line(rows[-1]), flush=True)
            keep()
        print(f"{len(cases)} cases, {len(out)} of them left out, in {time.monotonic() - began:.0f} s")
    if args.draw is not None and path is not None:
        print(f"written to {', '.join(map(str, draw_sweeps(path, args.draw)))}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Times attention as the paper's run-time figures do.")
    parser.add_argument("--lengths", type=int, nargs="+", help=f"tokens of a sequence; default {LENGTHS}")
    parser.add_argument("--heads", type=int, nargs="+", help=f"default {HEADS}")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="default all")
    parser.add_argument("--patterns", nargs="+", help="hash16, qk50 and so on; default all; dense is there anyway")
    parser.add_argument("--flex-lengths", type=int, nargs="*", default=FLEX_LENGTHS, help="those of FlexAttention")
    parser.add_argument("--processes", type=int, help="that compile side by side; default 14, with --quick 1")
    parser.add_argument("--resume", action="store_true", help="keep the file's rows; measure what it lacks or failed")
    parser.add_argument("--quick", action="store_true", help="tiny lengths, one sample")
    parser.add_argument("--samples", type=int, default=5, help="of which the median is taken; of long calls fewer")
    parser.add_argument("--implementation", help='"mosaic", "triton" or "xla"; default picks for the device')
    parser.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/sweeps-PLATFORM.json")
    parser.add_argument("--draw", type=Path, help="folder for figures of the result, drawn when all is measured")
    args = parser.parse_args()
    if args.draw is not None and args.quick and args.out is None:
        parser.error("--draw has nothing to draw: --quick writes a result with --out alone")
    args.processes = args.processes or (1 if args.quick else 14)
    return args


def _remaining(args: argparse.Namespace, rows: list[dict[str, Any]]) -> list[SweepCase]:
    """Returns the cases that are asked for and not among the rows."""
    sizes: dict[str, Any] = {"lengths": LENGTHS, "heads": HEADS, "batch": BATCH, "head_dim": HEAD_DIM}
    sizes |= {"dtype": "bfloat16"} | (QUICK if args.quick else {})
    sizes |= {name: getattr(args, name) for name in ("lengths", "heads") if getattr(args, name)}
    patterns = args.patterns or (QUICK_PATTERNS if args.quick else None)
    cases = sweep_cases(methods=args.methods, patterns=patterns, flex_lengths=args.flex_lengths, **sizes)
    # No cuDNN on a CPU, where --quick may run.
    cases = [case for case in cases if not (args.quick and case.method == "naive_cudnn")]
    done = {SweepCase(**{field: row[field] for field in SweepCase._fields}) for row in rows}
    return [case for case in cases if case not in done]


def _why_no_flex(platform: str) -> str | None:
    if platform != "gpu":
        return "not run: no GPU"
    return None if has_torch() else "not run: no torch"


def _row(case: SweepCase, record: Record) -> dict[str, Any]:
    return {"case": str(case.case), **case._asdict(), **record}


def _line(row: dict[str, Any]) -> str:
    cells = [f"{row['case']}, {row['method']}"]
    ms = {name: 1e3 * seconds["median"] for name, seconds in row["seconds"].items()}
    cells += [f"{ms[name]:.3f}" if name in ms else "-" for name in (*PARTS, "mask")]
    failed = [f"\n  {part}: {reason[:110]}" for part, reason in row["failed"].items()]
    widths = (46, 10, 10, 10, 9)
    first, *others = zip(cells, widths, strict=True)
    return "".join([f"{first[0]:<{first[1]}}", *(f"{cell:>{width}}" for cell, width in others), *failed])


if __name__ == "__main__":
    main()
