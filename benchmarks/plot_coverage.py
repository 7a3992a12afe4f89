"""Draws what Reformer's chunks cover, and what they cost, by length, beside exact buckets.

python benchmarks/plot_coverage.py                       docs/coverage.png, from results/coverage-gpu*.json
python benchmarks/plot_coverage.py --result FILE [FILE]  from others of coverage.py; the second may have the times

Where there are no times, the last panel has the pairs that are computed.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from environment import ROOT, device_in_a_word
from figures import INK, by_length, entry, figure_of, finish, finish_figure, legend

RESULTS = Path(__file__).resolve().parent / "results"
MEASURED = [RESULTS / "coverage-gpu.json", RESULTS / "coverage-gpu-speed.json"]
PICTURE = ROOT / "docs" / "coverage.png"
OURS, DENSE = "#0072B2", "#777777"  # Okabe and Ito, and grey
COLOURS = {"fixed": "#D55E00", "rule": "#E69F00", "growing": "#009E73"}
OURS_GROWING = "#56B4E9"
NAMES = {
    "fixed": "16 buckets, chunks of 64",
    "rule": "16 buckets, chunks of T / 8",
    "growing": "T / 512 buckets, chunks of 1024",
}
OURS_NAMES = {"fixed": "16 buckets", "growing": "T / 512 buckets"}
DASHED = (0, (4, 2))
ROUNDS = 4  # beside one

Records = list[dict[str, Any]]


def main() -> None:
    """Draws."""
    parser = argparse.ArgumentParser(description="Draws coverage and time by length.")
    parser.add_argument(
        "--result", type=Path, nargs="+", default=MEASURED, help="JSON of coverage.py, and of its times"
    )
    parser.add_argument("--out", type=Path, default=PICTURE, help="PNG or SVG; default docs/coverage.png")
    args = parser.parse_args()
    if not draw_coverage(args.result, args.out):
        parser.error("no result has coverage: run benchmarks/coverage.py")
    print(f"written to {args.out}, from {', '.join(path.name for path in args.result)}")


def draw_coverage(data: list[Path], path: Path) -> list[Path]:
    """Writes the figure, of the first result that has coverage and the first that has times.

    Returns:
        Its path; nothing where no coverage has been measured.
    """
    results = [json.loads(each.read_text()) for each in data]
    counted = next((result for result in results if result["coverage"]), None)
    if counted is None:
        return []
    figure = figure_of(13.2, 5.2)
    pairs, weights, cost = figure.subplots(1, 3)
    timed = next((result for result in results if result["speed"]), None)
    coverage = counted["coverage"]
    _draw_pairs(pairs, coverage)
    kinds = {record["vectors"] for record in coverage}
    vectors = next((kind for kind in ("trained", "clusters") if kind in kinds), coverage[0]["vectors"])
    _draw_weights(weights, [record for record in coverage if record["vectors"] == vectors], vectors)
    if timed is not None:
        _draw_times(cost, timed["speed"], device_in_a_word(timed["environment"]))
    else:
        _draw_computed(cost, [record for record in coverage if record["vectors"] == vectors])
    for ax, measured in ((pairs, coverage), (weights, coverage), (cost, timed["speed"] if timed else coverage)):
        by_length(ax, sorted({record["length"] for record in measured}))
        ax.set_xlabel("tokens of a sequence", color=INK)
        finish(ax)
    legend(figure, _entries(), *(each["environment"] for each in (counted, timed) if each), ncols=3)
    finish_figure(figure, "Exact buckets and Reformer's chunks, by length", path)
    return [path]


def _draw_pairs(ax: Any, coverage: Records) -> None:
    shown = [kind for kind in ("even", "skewed") if any(record["vectors"] == kind for record in coverage)]
    for kind in shown:
        style = "-" if kind == "even" else DASHED
        of_kind = [record for record in coverage if record["vectors"] == kind and record["rounds"] == 1]
        for setting, colour in COLOURS.items():
            _line(ax, of_kind, setting, lambda record: record["covered"]["reformer"], colour, style)
        _line(ax, of_kind, "fixed", lambda record: record["covered"]["ours"], OURS, style)
    _shares(ax, "same-bucket pairs that are shown\n(dashed: skewed buckets)")


def _draw_weights(ax: Any, of_kind: Records, vectors: str) -> None:
    for rounds, style in ((1, "-"), (ROUNDS, DASHED)):
        records = [record for record in of_kind if record["rounds"] == rounds]
        for setting, colour in COLOURS.items():
            _line(ax, records, setting, lambda record: record["top"]["reformer"], colour, style)
        for setting, colour in (("fixed", OURS), ("growing", OURS_GROWING)):
            _line(ax, records, setting, lambda record: record["top"]["ours"], colour, style)
    source = "of a trained model" if vectors == "trained" else f"vectors: {vectors}"
    _shares(ax, f"32 largest weights that are shown\n({source}; dashed: {ROUNDS} rounds)")


def _draw_computed(ax: Any, of_kind: Records) -> None:
    records = [record for record in of_kind if record["rounds"] == 1]
    for setting, colour in COLOURS.items():
        _line(ax, records, setting, lambda record: record["computed"]["reformer"], colour, "-")
    for setting, colour in (("fixed", OURS), ("growing", OURS_GROWING)):
        _line(ax, records, setting, lambda record: record["computed"]["ours"], colour, "-")
    ax.set_yscale("log")
    ax.axhline(1, color=DENSE, linewidth=1)
    ax.set_title("pairs that are computed, over dense causal's", color=INK, fontsize=11)


def _draw_times(ax: Any, speed: Records, where: str) -> None:
    timed = [record for record in speed if "seconds" in record]
    milliseconds = lambda record: 1e3 * record["seconds"]["median"]
    for rounds, style in ((1, "-"), (ROUNDS, DASHED)):
        for scheme, colours in (("reformer", COLOURS), ("ours", {"fixed": OURS, "growing": OURS_GROWING})):
            records = [r for r in timed if r["scheme"].startswith(scheme) and r["rounds"] == rounds]
            for setting, colour in colours.items():
                _line(ax, records, setting, milliseconds, colour, style)
    dense = sorted((record["length"], milliseconds(record)) for record in timed if record["scheme"] == "dense")
    ax.plot(*zip(*dense, strict=True), color=DENSE, marker="o", markersize=3)
    ax.set_yscale("log")
    ax.set_title(f"ms, forward + backward, {where}\n(dashed: {ROUNDS} rounds)", color=INK, fontsize=11)


def _line(ax: Any, records: Records, setting: str, value: Any, colour: str, style: Any) -> None:
    points = sorted((record["length"], value(record)) for record in records if record["setting"] == setting)
    if points:
        ours = colour in (OURS, OURS_GROWING)  # below, and wide enough to be seen where lines are one
        look: dict[str, Any] = {"linewidth": 3.6, "zorder": 2} if ours else {"linewidth": 1.4, "zorder": 3}
        ax.plot(*zip(*points, strict=True), color=colour, linestyle=style, marker="o", markersize=3.5, **look)


def _shares(ax: Any, title: str) -> None:
    ax.set_ylim(0, 1.04)
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    ax.set_title(title, color=INK, fontsize=11)


def _entries() -> list[Any]:
    entries = [(OURS, f"ours, {OURS_NAMES['fixed']}"), (OURS_GROWING, f"ours, {OURS_NAMES['growing']}")]
    entries.append((DENSE, "dense causal attention"))
    entries += [(colour, f"Reformer, {NAMES[setting]}") for setting, colour in COLOURS.items()]
    return [entry(label, color=colour, marker="o", markersize=4) for colour, label in entries]


if __name__ == "__main__":
    main()
