"""What all figures have in common: ink, panels, axes of lengths, gaps in lines, legends that say what ran where."""

import argparse
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from environment import ROOT, described

INK, GREY, GRID = "#222222", "#8A8A8A", "#E4E4E4"


def draw_from(data: Path, draw: Callable[[Path, Path], list[Path]]) -> None:
    """The command of a module that draws results into a folder: which results, and which folder."""
    parser = argparse.ArgumentParser(description="Draws figures of results.")
    parser.add_argument("--data", type=Path, default=data, help=f"results; default {data.relative_to(ROOT)}")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder; default docs/")
    args = parser.parse_args()
    print(f"written to {', '.join(map(str, draw(args.data, args.out)))}")


def figure_of(width: float, height: float) -> Any:
    """A figure of so many inches, whose panels and legends make room for one another."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.06)
    return figure


def by_length(ax: Any, lengths: Iterable[int]) -> None:
    """Makes a panel's horizontal axis one of lengths, each twice the one before."""
    ax.set_xscale("log", base=2)
    lengths = list(lengths)
    ax.set_xticks(lengths, [f"{length / 1024:g}k" if length >= 1024 else str(length) for length in lengths])


def with_gaps(points: Mapping[int, float], along: Iterable[int]) -> list[tuple[int, float]]:
    """Returns the points of a line in order, NaN where one is missing between others, so that the line breaks there.

    Args:
        points: y by x.
        along: every x of the axis, rising.
    """
    return [(x, points.get(x, math.nan)) for x in along if points and min(points) <= x <= max(points)]


def finish(ax: Any) -> None:
    """Draws a panel's grid and no more frame than it needs."""
    ax.minorticks_off()
    ax.grid(color=GRID)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def entry(label: str, **style: Any) -> Any:
    """An entry of a legend that stands for no line of a panel."""
    from matplotlib.lines import Line2D

    look: dict[str, Any] = {"color": INK} | style
    return Line2D([], [], label=label, **look)


def legend(figure: Any, handles: Iterable[Any], *environments: dict[str, Any], **options: Any) -> None:
    """Puts the legend below all panels; its title says what the results of these environments were measured on."""
    titled = {"title": described(*environments), "title_fontsize": 9} if environments else {}
    place = {"loc": "outside lower center", "frameon": False, "fontsize": 9}
    figure.legend(handles=list(handles), **titled, **place, **options)


def finish_figure(figure: Any, title: str, path: Path) -> None:
    """Gives the figure its title and writes it."""
    figure.suptitle(title, color=INK, fontweight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
