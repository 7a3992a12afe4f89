"""Draws speed-up over dense attention by length, beside what can be had and what the paper measured.

python benchmarks/plot.py            docs/speedup.png, sweeps-*.png, language-*.png, coverage.png, and all tables
python benchmarks/plot.py --table    prints the tables and writes nothing

All of ours comes from results/density-gpu.json and results/attention-gpu-end-to-end.json: forward + backward, whole
calls, over cuDNN's dense causal attention in the same run. The ceiling is dense attention's time for the visible pairs
alone: a speed-up of 1 / density. `plot_sweeps.py`, `plot_language.py` and `plot_coverage.py` draw the others, of
results that are there.
"""

import argparse
from pathlib import Path
from typing import Any

from environment import ROOT, device
from figures import INK, by_length, entry, figure_of, finish, finish_figure, legend
from language_results import RESULTS as LANGUAGE
from pattern_names import brief
from plot_coverage import MEASURED as COVERAGE
from plot_coverage import draw_coverage
from plot_language import draw_language
from plot_sweeps import draw_sweeps
from sweep_results import SWEEPS, paper
from tables import PAGES, SINGLE, SWEPT, Records, load, tables, write_pages

PICTURE = ROOT / "docs" / "speedup.png"
COLOURS = {"hash16": "#0072B2", "hash64": "#009E73", "qk50": "#E69F00", "qk70": "#D55E00"}  # Okabe and Ito
PANELS = {"Hash-sparse": ("hash16", "hash64"), "QK-sparse": ("qk50", "qk70")}


def main() -> None:
    """Prints the tables, or draws and writes them into the pages."""
    parser = argparse.ArgumentParser(
        description="Draws speed-up by length, and writes the tables of README.md and docs/."
    )
    parser.add_argument("--table", action="store_true", help="print the tables and write nothing")
    parser.add_argument("--out", type=Path, default=PICTURE, help="PNG or SVG; default docs/speedup.png")
    args = parser.parse_args()
    if args.table:
        print(*(f"{name}\n\n{table}\n" for name, table in tables().items()), sep="\n")
        return
    draw(args.out)
    drawn = draw_sweeps(SWEEPS, args.out.parent) if SWEEPS.exists() else []
    drawn += draw_language(LANGUAGE, args.out.parent) if LANGUAGE.exists() else []
    drawn += draw_coverage(COVERAGE, args.out.parent / "coverage.png") if all(map(Path.exists, COVERAGE)) else []
    write_pages()
    print(f"written to {', '.join(map(str, (args.out, *drawn, *PAGES)))}")


def draw(path: Path) -> None:
    """Writes the figure: a panel for each method."""
    figure = figure_of(10.4, 4.8)
    (swept_on, swept), (single_on, single) = load(SWEPT), load(SINGLE)
    axes = figure.subplots(1, len(PANELS), sharey=True)
    for ax, (title, patterns) in zip(axes, PANELS.items(), strict=True):
        for pattern in patterns:
            _draw_pattern(ax, pattern, swept, single)
        _finish(ax, title, sorted({length for _, length in swept}))
    axes[0].set_ylabel("times as fast as dense attention", color=INK)
    legend(figure, _entries(swept_on, single_on), ncols=3)
    finish_figure(figure, "Forward + backward over dense attention, by length", path)


def _draw_pattern(ax: Any, pattern: str, swept: Records, single: Records) -> None:
    colour = COLOURS[pattern]
    ours = sorted((length, record) for (name, length), record in swept.items() if name == pattern)
    lengths = [length for length, _ in ours]
    ax.plot(lengths, [_speedup(record) for _, record in ours], color=colour, marker="o", markersize=4, linewidth=2)
    ax.plot(lengths, [1 / record["density"] for _, record in ours], color=colour, linestyle=(0, (5, 4)), linewidth=1)
    ax.annotate(
        f"{brief(pattern)}: at most {1 / ours[0][1]['density']:.3g}x",
        (lengths[0], 1 / ours[0][1]["density"]),
        xytext=(0, 4),
        textcoords="offset points",
        color=colour,
        fontsize=9,
    )
    points = [(length, _speedup(record)) for (name, length), record in single.items() if name == pattern]
    ax.scatter(*_columns(points), color=colour, marker="*", s=110, zorder=3)
    measured = paper()
    ms = measured["forward_backward_ms"]
    alone = [(measured["length"], ms["flash"] / ms[pattern])]
    training = [(int(length), x) for length, x in measured["training_speedup"].get(pattern, {}).items()]
    for points, marker, size in ((alone, "s", 45), (training, "D", 40)):
        ax.scatter(*_columns(points), facecolor="white", edgecolor=colour, marker=marker, s=size, zorder=4)


def _speedup(record: dict[str, Any]) -> float:
    return record["speedup"]["forward_backward"]


def _columns(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _finish(ax: Any, title: str, lengths: list[int]) -> None:
    by_length(ax, lengths)
    ax.set_yscale("log", base=2)
    ax.axhline(1, color=INK, linewidth=1)
    ax.annotate("dense", (lengths[-1], 1), xytext=(0, 3), textcoords="offset points", ha="right", fontsize=9, color=INK)
    factors = [0.5, 1, 2, 4, 8, 16, 32, 64]
    ax.set_yticks(factors, [f"{factor:g}x" for factor in factors])
    ax.set_ylim(0.5, 100)
    ax.set_title(title, color=INK)
    ax.set_xlabel("tokens of a sequence", color=INK)
    finish(ax)


def _entries(swept_on: dict[str, Any], single_on: dict[str, Any]) -> list[Any]:
    point: dict[str, Any] = {"linestyle": "", "markerfacecolor": "white"}
    return [
        entry(f"ours over cuDNN, {device(swept_on)},\ncommit {swept_on['commit'][:7]}", marker="o", markersize=4),
        entry(
            f"the same, {device(single_on)},\ncommit {single_on['commit'][:7]}", linestyle="", marker="*", markersize=10
        ),
        entry("ceiling: dense time for\nthe visible pairs alone", linestyle=(0, (5, 4)), linewidth=1),
        entry("paper over FlashAttention, A100,\nread off its figures", marker="s", **point),
        entry("paper over FlashAttention,\nwhole training steps", marker="D", **point),
    ]


if __name__ == "__main__":
    main()
