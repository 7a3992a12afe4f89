"""The tables of the README and of docs/ out of measured results: whole calls, training steps, break-even."""

import functools
import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

from device_tables import device_tables
from environment import ROOT, load_result, source
from language_runs import GROUPS, chosen
from language_tables import language_tables
from markdown_table import markdown, span
from pattern_names import words
from sweep_tables import sweep_tables
from time_shares import PACKAGE

RESULTS = Path(__file__).resolve().parent / "results"
SHOWN = {"hash16": "16 buckets", "hash64": "64 buckets", "qk50": "half of q and k dropped", "qk70": "70 % dropped"}
SWEPT, SINGLE, STEPS = "density-gpu.json", "attention-gpu-end-to-end.json", "train-step-gpu.json"
BLOCKS = ("blocks-gpu.json", "blocks-gpu-64k.json")
DRAWS = "evaluation-draws-gpu.json"
BOTH = "forward_backward"
PAGES = {
    "README.md": ("speed-up", "end-to-end", "seeds", "blocks", "training-step", "break-even"),
    "docs/index.md": ("break-even",),
    "docs/patterns.md": ("patterns",),
    "docs/devices.md": ("scaling", "divided-sequences"),
    "docs/results.md": (
        *("seeds", "sooner", "sparse", "longer", "paper", "paper-training", "language-models", "evaluation-draws"),
        *("speed-up", "end-to-end", "sweeps", "sweeps-others", "sweeps-paper", "reformer", "blocks", "training-step"),
    ),
}
"""Pages by their path, and the tables that each has."""
Records = dict[tuple[str, int], dict[str, Any]]


def load(name: str) -> tuple[dict[str, Any], Records]:
    """Returns the environment of a result, and its whole calls at N12 H64 by pattern and length."""
    result = load_result(RESULTS / name)
    records = {}
    for record in result["cases"]:
        named = re.fullmatch(r"B\d+-T(\d+)-N12-H64-(\w+)-bf16", record["case"])
        if named is not None:
            records[named[2], int(named[1])] = record
    return result["environment"], records


@functools.cache
def tables() -> dict[str, str]:
    """Returns each table by the name in its markers."""
    measured = json.loads(PACKAGE.read_text())
    return {
        "speed-up": _speed_up(),
        "end-to-end": _end_to_end(),
        "training-step": _training_step(),
        "blocks": _blocks(),
        "break-even": _break_even(measured),
        "patterns": _patterns(),
        **device_tables(),
        **sweep_tables(),
        **language_tables(),
        "evaluation-draws": _evaluation_draws(),
    }


def in_page(page: str, text: str) -> str:
    """Returns the text of a page with each of its tables anew between its markers.

    Raises:
        ValueError: if a table has no results, or the page has not one pair of markers for it.
    """
    made = tables()
    for name in PAGES[page]:
        if name not in made:
            raise ValueError(f"{page} has a table {name!r} of which there are no results; measure it, or see PAGES.")
        begin, end = f"<!-- table {name} -->\n\n", f"\n<!-- end of {name} -->"
        pattern = f"{begin}.*?{end}"
        if len(re.findall(pattern, text, re.DOTALL)) != 1:
            raise ValueError(f"{page} needs the lines {begin.strip()} and {end.strip()}, once, around its table.")
        text = re.sub(pattern, lambda _, new=f"{begin}{made[name]}\n{end}": new, text, flags=re.DOTALL)
    return text


def write_pages() -> None:
    """Writes the tables anew into all pages."""
    texts = {ROOT / page: in_page(page, (ROOT / page).read_text()) for page in PAGES}  # all, before one is written
    for path, text in texts.items():
        path.write_text(text)


def _speed_up() -> str:
    """Whole calls, forward + backward, over cuDNN's dense causal attention."""
    environment, records = load(SWEPT)
    rows = [["T", "cuDNN dense", *SHOWN.values()]]
    for length in sorted({length for _, length in records}):
        of_length = [records[pattern, length] for pattern in SHOWN]
        dense = of_length[0]["seconds"][f"dense_{BOTH}"]
        speedups = [record["speedup"][BOTH] for record in of_length]
        rows.append([str(length), f"{dense * 1e3:.2f} ms", *(f"{x:.1f}x" for x in speedups)])
    return f"{markdown(rows)}\n\n{source(environment)}."


def _end_to_end() -> str:
    """Whole calls case by case, forward + backward, and what of them the kernels take."""
    environment, records = load(SINGLE)
    rows = [["", "cuDNN dense", "ours", "its kernels", "speed-up", "peak memory, dense and ours"]]
    for (pattern, length), record in records.items():
        times = [f"dense_{BOTH}", BOTH, f"kernel_{BOTH}"]
        peaks = [record["memory_bytes"][name]["peak"] / 2**20 for name in times[:2]]
        rows.append(
            [
                f"{record['case'].split('-')[0]} T{length}, {words(pattern)}",
                *(f"{1e3 * record['seconds'][name]['median']:.2f} ms" for name in times),
                f"{record['speedup'][BOTH]:.3g}x",
                f"{peaks[0]:.0f}, {peaks[1]:.0f} MiB",
            ]
        )
    return f"{markdown(rows)}\n\n{source(environment)}."


def _training_step() -> str:
    """Steps by length: milliseconds, tokens a second, MFU, what is visible, and how much faster than dense ones."""
    result = load_result(RESULTS / STEPS)
    speeds = ["ms a step", "of all samples", "tokens/s", "MFU"]
    rows = [["T", "attention", *speeds, "visible, first to last step", "over cuDNN", "over Pallas-Triton"]]
    for step in result["steps"]:
        over = [step["speedup"].get(f"over_{name}") for name in ("dense", "mha")]
        rows.append(
            [
                str(step["length"]),
                words(step["attention"]),
                f"{1e3 * step['seconds']['median']:.1f}",
                " to ".join(f"{1e3 * step['seconds'][name]:.1f}" for name in ("best", "worst")),
                f"{step['tokens_per_second'] / 1e3:.0f} k",
                f"{step['mfu']:.2f}",
                "" if step["visible"] is None else " to ".join(f"{step['visible'][x]:.3g}" for x in ("first", "last")),
                *("" if x is None else f"{x:.2f}x" for x in over),
            ]
        )
    return f"{markdown(rows)}\n\n{source(result['environment'])}."


def _evaluation_draws() -> str:
    """Held-out loss by the draw of hashes or drops that a run evaluates with, and by others."""
    result = load_result(RESULTS / DRAWS)
    rows = [["layers", "keys", "loss, the run's own draw", "other draws, mean", "least to most"]]
    for measured in result["runs"]:
        (run,) = chosen([*GROUPS], [measured["run"]])
        others = measured["others"]
        rows.append(
            [
                run.kind.words,
                "shared" if run.kind.shared else "own",
                f"{measured['own']:.3f}",
                f"{statistics.mean(others):.3f}",
                span(others, "{:.3f}"),
            ]
        )
    return f"{markdown(rows)}\n\n{source(result['environment'])}."


def _blocks() -> str:
    """Whole calls over block masks, forward + backward: how much faster than cuDNN dense ours and FlexAttention are."""
    results = [load_result(RESULTS / name) for name in BLOCKS]
    speedups: dict[tuple[int, int], dict[int, str]] = {}
    for case in (case for result in results for case in result["cases"] if case["kind"] == "blocks"):
        flex = case["seconds"]["dense"]["median"] / case["flex_seconds"][BOTH]
        of_shape = speedups.setdefault((case["length"], case["block"]), {})
        of_shape[case["percent"]] = f"{case['speedup']['given']:.2f}x ({flex:.2f}x)"
    percents = sorted({percent for of_shape in speedups.values() for percent in of_shape})
    rows = [["T", "blocks of", *(f"{percent} % of causal's" for percent in percents)]]
    for (length, block), of_shape in sorted(speedups.items()):
        rows.append([str(length), str(block), *(of_shape[percent] for percent in percents)])
    return f"{markdown(rows)}\n\n{source(*(result['environment'] for result in results))}."


def _patterns() -> str:
    """One call of each pattern at the longest length, forward + backward, over cuDNN's dense causal attention."""
    environment, swept = load(SWEPT)
    longest = max(length for _, length in swept)
    result = load_result(RESULTS / BLOCKS[1])
    cases = [(words(name), swept[name, longest], BOTH) for name in SHOWN]
    for case in result["cases"]:
        name = {
            "blocks": f"{case['percent']} % of causal's blocks of {case['block']}, plan given",
            "sinks": f"{case['sinks']} sinks and a window of {case['window']}, plan given",
            "top_k": f"the best {case['chosen']} of blocks of {case['block']}, choice included",
        }[case["kind"]]
        cases.append((name, case, "made" if case["kind"] == "top_k" else "given"))
    rows = [["pattern", "density", "ms", "times as fast as dense"]]
    for name, case, part in cases:
        density = case["density"] if "density" in case else case["tiles"]["density"]
        seconds = case["seconds"][part]
        median = seconds if isinstance(seconds, float) else seconds["median"]
        rows.append([name, f"{density:.3g}", f"{1e3 * median:.2f}", f"{case['speedup'][part]:.1f}x"])
    rows = [rows[0], *sorted(rows[1:], key=lambda row: float(row[1]))]
    return f"{markdown(rows)}\n\n{longest} tokens. {source(environment)}; {source(result['environment'])}."


def _break_even(measured: dict[str, Any]) -> str:
    """By device and length: from how many buckets or drops on, so up to which density, sparse attention is faster.

    Faster than what `Auto` would run instead: cuDNN on a GPU, our own dense attention on a CPU.
    """
    rows = [["device", "T", "buckets, from", "density, up to", "dropped of q and k, from", "density, up to"]]
    for kind in sorted(measured):
        for row in measured[kind]["lengths"]:
            dense = row["own_dense"] if kind == "cpu" else 1.0
            hashed, dropped = (break_even(row[method], dense) for method in ("hash", "qk"))
            # Even, as `lsh_buckets` makes them.
            buckets = "never" if hashed is None else f"{2 * math.ceil(0.5 / hashed)}"
            rate = "never" if dropped is None else f"{100 * (1 - math.sqrt(dropped)):.0f} %"
            densities = ["-" if x is None else f"{x:.2f}" for x in (hashed, dropped)]
            rows.append([kind, str(row["length"]), buckets, densities[0], rate, densities[1]])
    sources = "; ".join(source(measured[kind]["environment"]) for kind in sorted(measured))
    return f"{markdown(rows)}\n\n{sources}."


def break_even(pairs: list[list[float]], dense: float) -> float | None:
    """Returns the density up to which sparse attention is faster, 1 where it always is, None where it never is.

    Args:
        pairs: measured [density, time share], density rising.
        dense: time share of the dense attention that it is held against.
    """
    below = None
    for density, share in pairs:
        if share >= dense:
            if below is None:
                return None
            start, faster = below
            part = math.log(dense / faster) / math.log(share / faster)
            return start * (density / start) ** part
        below = density, share
    return 1.0
