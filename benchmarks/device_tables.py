"""The tables of several devices: training steps over meshes, and sequences that are divided."""

from pathlib import Path
from typing import Any

from environment import device_in_a_word, load_result, source
from markdown_table import markdown, or_dash
from pattern_names import words

RESULTS = Path(__file__).resolve().parent / "results"
SCALED = (
    *("scaling-gpu.json", "scaling-gpu-two-h100.json", "scaling-gpu-four.json"),
    *("scaling-gpu-context-gather.json", "scaling-gpu-context-ring.json"),
)
"""Files of steps over meshes, the latest last: of what several have, it is shown."""
DIVIDED = ("context-gpu.json", "context-gpu-four.json", "context-gpu-four-64k.json")
SUM_BYTES = "xla_gpu_all_reduce_combine_threshold_bytes"
SUMS_TOGETHER = "xla_gpu_experimental_parallel_collective_overlap_limit"
WAYS = ("ring, in order", "ring, zigzag", "gather, in order", "gather, zigzag")


def device_tables() -> dict[str, str]:
    """Returns each table by the name in its markers."""
    return {"scaling": _scaling(), "divided-sequences": _divided_sequences()}


def _scaling() -> str:
    """Training steps over meshes, each beside one device of the same run; what was measured anew, as it was last."""
    last = {
        _what(step, result["environment"]): (step, result["environment"])
        for result in (load_result(RESULTS / name) for name in SCALED)
        for step in result["steps"]
        if step["devices"] > 1
    }
    titles = ["devices", "attention", "tokens a device", "mesh", "gradients are summed", "ms a step", "tokens/s"]
    rows = [[*titles, "efficiency", "memory a device"]]
    for what, (step, _) in sorted(last.items()):
        rows.append(
            [
                *what,
                _sums(step.get("compiler_options", {})),
                f"{1e3 * step['seconds']['median']:.1f}",
                f"{step['tokens_per_second'] / 1e3:.0f} k",
                f"{step['efficiency']:.3f}",
                f"{step['memory_bytes']['peak'] / 2**30:.1f} GiB",
            ]
        )
    return f"{markdown(rows)}\n\n{source(*(environment for _, environment in last.values()))}."


def _what(step: dict[str, Any], environment: dict[str, Any]) -> tuple[str, ...]:
    """What was measured, in the first cells of its row."""
    how = ", pmap" if step["parallel"] == "pmap" else ""
    if "context" in step["mesh"]:  # before there was a choice, by ring
        how = {"gather": ", keys gathered", "ring": ", by ring"}[step.get("exchange", "ring")]
    return (
        f"{step['devices']} {device_in_a_word(environment)}",
        words(step["attention"]),
        str(step["batch"] * step["length"] // step["devices"]),
        step["mesh"] + how,
    )


def _sums(options: dict[str, int]) -> str:
    """How XLA is told to sum gradients."""
    if not options:
        return "XLA's way"
    most, together = options[SUM_BYTES], options[SUMS_TOGETHER]
    return f"{most / 1e6:.0f} MB, {together} at a time"


def _divided_sequences() -> str:
    """A sequence over devices, by exchange and layout, forward + backward, beside one device."""
    results = [load_result(RESULTS / name) for name in DIVIDED]
    rows = [["T", "pattern", "devices", "one device, ms", *(f"{way}, ms" for way in WAYS), "best over one device"]]
    for (length, buckets, devices), times in sorted(_ways(results).items()):
        one = times["one device"]
        cells = [or_dash(times.get(way) and 1e3 * times[way], "{:.3g}") for way in WAYS]
        best = one / min(times[way] for way in WAYS if way in times)
        pattern = f"{buckets} buckets" if buckets else "causal"
        rows.append([str(length), pattern, str(devices), f"{1e3 * one:.3g}", *cells, f"{best:.2f}x"])
    return f"{markdown(rows)}\n\n{source(*(result['environment'] for result in results))}."


def _ways(results: list[dict[str, Any]]) -> dict[tuple[int, int, int], dict[str, float]]:
    """Seconds by way, by length, buckets and devices."""
    found: dict[tuple[int, int, int], dict[str, float]] = {}
    for result in results:
        for case in result["cases"]:
            times = found.setdefault((case["length"], case["buckets"], result["devices"]), {})
            times["one device"] = case["seconds"]["one_device"]["median"]
            times[f"{case['exchange']}, {case['layout']}"] = case["seconds"]["forward_backward"]["median"]
    return found
