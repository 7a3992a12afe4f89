"""Draws what `sweeps.py` measured as the paper does: time by length, and speed-up by buckets and dropped shares.

`plot.py` calls this where there are results; by itself: python benchmarks/plot_sweeps.py --data FILE --out FOLDER
"""

import math
from pathlib import Path
from typing import Any

from environment import device
from figures import GREY, INK, by_length, draw_from, entry, figure_of, finish, finish_figure, legend, with_gaps
from pattern_names import brief, parted
from sweep_cases import BATCH, HASHED, HEAD_DIM, HEADS, PARTS, QK
from sweep_results import SWEEPS, Rows, density, load_rows, paper

SHADES = {"hash": ("YlGnBu", 0.38, 1.0), "qk": ("YlOrRd", 0.32, 1.0)}  # colour maps, and what is used of them
ROWS = {"forward": "forward", "backward": "backward alone", "forward_backward": "forward + backward"}
NAIVE = {"naive": ("bool mask, XLA", (0, (5, 2))), "naive_cudnn": ("bool mask, cuDNN", (0, (1, 1.5)))}
FIGURES = {
    "sweeps-hash.png": ("Hash-sparse attention by length and number of buckets", HASHED, "hash16"),
    "sweeps-qk.png": ("QK-sparse attention by length and dropped share of queries and keys", QK, "qk50"),
}
"""By file: title, patterns, and the one whose masked version is drawn."""

Lines = dict[tuple[str, str], dict[int, float]]
"""Milliseconds by length, of each method and pattern."""


def draw_sweeps(data: Path, folder: Path) -> list[Path]:
    """Writes the figures into a folder, and returns their paths; none where nothing has been measured."""
    environment, rows = load_rows(data)
    if not rows:
        return []
    paths = [folder / name for name in (*FIGURES, "sweeps-paper.png")]
    for path in paths[:-1]:
        _draw_times(path, environment, rows, *FIGURES[path.name])
    _draw_speedups(paths[-1], environment, rows)
    return paths


def _draw_times(
    path: Path, environment: dict[str, Any], rows: Rows, title: str, patterns: tuple[str, ...], masked: str
) -> None:
    """A row of panels for each part, a column for each number of heads."""
    figure = figure_of(10.4, 11.8)
    heads = [n for n in HEADS if any(key[2] == n for key in rows)] or sorted({key[2] for key in rows})
    lengths = sorted({key[3] for key in rows})
    panels = figure.subplots(len(PARTS), len(heads), sharex=True, sharey="row", squeeze=False)
    for i, part in enumerate(PARTS):
        for ax, n in zip(panels[i], heads, strict=True):
            _draw_panel(ax, _of_panel(rows, part, n), lengths, patterns, masked)
            _finish_times(ax, lengths)
            if i == 0:
                ax.set_title(f"batch {BATCH}, {n} heads of {HEAD_DIM}", color=INK, fontsize=11)
        panels[i][0].set_ylabel(f"{ROWS[part]}, ms", color=INK)
    for ax in panels[-1]:
        ax.set_xlabel("tokens of a sequence", color=INK)
    handles = {}
    for ax in panels.flat:
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    legend(figure, handles.values(), environment, labels=list(handles), ncols=4, handlelength=3)
    finish_figure(figure, title, path)


def _of_panel(rows: Rows, part: str, heads: int) -> Lines:
    lines: Lines = {}
    for (method, pattern, n, length), ms in rows.items():
        if n == heads and part in ms:
            lines.setdefault((method, pattern), {})[length] = ms[part]
    return lines


def _draw_panel(ax: Any, lines: Lines, lengths: list[int], patterns: tuple[str, ...], masked: str) -> None:
    def draw(method: str, pattern: str, label: str, **style: Any) -> None:
        ms = lines.get((method, pattern), {})
        along = sorted(ms) if method == "flex" else lengths  # which is measured at few lengths of them
        if ms:
            ax.plot(*zip(*with_gaps(ms, along), strict=True), label=label, **style)

    draw("dense", "causal", "cuDNN dense causal", color=INK, linewidth=2.2, zorder=3)
    for method, (label, dashes) in NAIVE.items():
        draw(method, masked, label, color=GREY, linestyle=dashes, linewidth=1.8, marker="s", markersize=3)
    for pattern, colour in zip(patterns, _colours(patterns), strict=True):
        draw("sparse", pattern, brief(pattern), color=colour, marker="o", markersize=3.5, linewidth=1.8)
    for pattern, colour in zip(patterns, _colours(patterns), strict=True):
        style = {"linestyle": (0, (1, 2)), "marker": "x", "markersize": 6, "linewidth": 1.2}
        draw("flex", pattern, f"FlexAttention, {brief(pattern)}, sorted before", color=colour, **style)


def _draw_speedups(path: Path, environment: dict[str, Any], rows: Rows) -> None:
    """How many times as fast as dense attention, each over its own, at the paper's shape."""
    measured = paper()
    heads, length, ms = measured["heads"], measured["length"], measured["forward_backward_ms"]
    dense = rows.get(("dense", "causal", heads, length), {}).get("forward_backward")
    figure = figure_of(10.4, 5.4)
    axes = figure.subplots(1, 2, sharey=True)
    for ax, patterns in zip(axes, (HASHED, QK), strict=True):
        colour = _colours(patterns)[-3]
        at = range(len(patterns))
        ours = [rows.get(("sparse", pattern, heads, length), {}).get("forward_backward") for pattern in patterns]
        ax.plot(at, [1 / density(x) for x in patterns], color=GREY, linestyle=(0, (5, 4)), linewidth=1.2)
        points = {i: dense / x for i, x in enumerate(ours) if dense and x}
        _draw_points(ax, with_gaps(points, at), colour, above=True, marker="o", markersize=6, linewidth=2.2)
        style = {"marker": "s", "markersize": 6, "linewidth": 1.4, "markerfacecolor": "white"}
        _draw_points(ax, [(i, ms["flash"] / ms[x]) for i, x in enumerate(patterns)], colour, above=False, **style)
        ax.axhline(1, color=INK, linewidth=1)
        ax.set_xticks(at, [parted(pattern)[1] for pattern in patterns])
        ax.margins(x=0.08)
        finish(ax)
    axes[0].set_title("Hash-sparse", color=INK)
    axes[0].set_xlabel("buckets", color=INK)
    axes[1].set_title("QK-sparse", color=INK)
    axes[1].set_xlabel("dropped of queries, and of keys, %", color=INK)
    axes[0].set_ylabel("times as fast as dense attention", color=INK)
    axes[0].set_yscale("log", base=2)
    ticks = [2**i for i in range(-1, 7)]
    axes[0].set_yticks(ticks, [f"{x:g}x" for x in ticks])
    axes[0].set_ylim(0.6, 90)
    legend(figure, _speedup_entries(environment, measured), environment, ncols=3)
    title = f"Forward + backward over dense attention, batch {measured['batch']}, {heads} heads, {length} tokens"
    finish_figure(figure, title, path)


def _draw_points(ax: Any, points: list[tuple[int, float]], colour: Any, *, above: bool, **style: Any) -> None:
    if not points:
        return
    from matplotlib.patheffects import withStroke

    ax.plot(*zip(*points, strict=True), color=colour, **style)
    for x, y in points:
        if math.isnan(y):
            continue
        place = {"xytext": (0, 8 if above else -15), "textcoords": "offset points", "ha": "center"}
        place["path_effects"] = [withStroke(linewidth=3, foreground="white")]  # legible on a line
        ax.annotate(f"{y:.1f}x" if y < 9.95 else f"{y:.0f}x", (x, y), color=colour, fontsize=9, **place)


def _speedup_entries(environment: dict[str, Any], measured: dict[str, Any]) -> list[Any]:
    return [
        entry(f"ours over cuDNN,\n{device(environment)}", marker="o", linewidth=2.2),
        entry("cuDNN's time for the\nvisible pairs alone", linestyle=(0, (5, 4)), linewidth=1.2),
        entry(
            f"paper over the FlashAttention of 2023,\n{measured['device']}, read off its figures",
            marker="s",
            markerfacecolor="white",
        ),
    ]


def _finish_times(ax: Any, lengths: list[int]) -> None:
    by_length(ax, lengths)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    finish(ax)


def _colours(patterns: tuple[str, ...]) -> list[Any]:
    """From light for the first, of which most is visible, to dark."""
    from matplotlib import colormaps

    name, first, last = SHADES[parted(patterns[0])[0]]
    return [colormaps[name](first + (last - first) * i / (len(patterns) - 1)) for i in range(len(patterns))]


if __name__ == "__main__":
    draw_from(SWEEPS, draw_sweeps)
