"""Draws how language models learn: held-out loss by time and step, and how well and fast every choice is at the end.

`plot.py` calls this where there are results; by itself: python benchmarks/plot_language.py
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from figures import INK, draw_from, entry, figure_of, finish, finish_figure, legend
from language_results import RESULTS, Curve, load_curves
from language_runs import GROUPS
from language_tables import Pair, beside_dense, by_kind, by_text, how_much_sooner, pairs_of

SPARSE, DENSE = "#0072B2", INK
SHARED, OWN = "#D55E00", SPARSE  # Okabe and Ito
HEADLINE, LONGER = "language-models.png", "language-longer.png"
PAPER, CHOICES, PROGRESS = "language-paper.png", "language-choices.png", "language-progress.png"
PAIR_COLOURS = (DENSE, SPARSE, "#D55E00", "#009E73")
PAPER_COLOURS = {"dense": DENSE}
PAPER_COLOURS |= {"hash8": "#9ECAE1", "hash16": "#4292C6", "hash32": "#084594"}
PAPER_COLOURS |= {"qk30": "#FDAE6B", "qk50": "#F16913", "qk70": "#A63603"}
HASHING = ("hash16", "hash16-rotated", "hash16-centred", "hash16-near-own-keys")
WORST = 2.25  # loss at which the axis ends; what is worse is named at its edge


def draw_language(data: Path, folder: Path) -> list[Path]:
    """Writes those figures into a folder of which there are results, and returns their paths."""
    curves = load_curves(data)
    chosen = [curves[run] for run in GROUPS["choices"] if run in curves]
    paper = [curves[run] for run in GROUPS["paper"] if run in curves]
    dense = next((curve for curve in chosen if curve.run.attention == "dense"), None)
    figures: dict[Path, tuple[Callable[[Path, list[Any]], None], list[Any]]] = {
        folder / HEADLINE: (_draw_pairs, beside_dense(curves)),
        folder / LONGER: (_draw_pairs, pairs_of(curves, "longer")),
        folder / PAPER: (_draw_paper, paper),
        folder / CHOICES: (_draw_choices, chosen),
        folder / PROGRESS: (
            functools.partial(_draw_progress, dense=dense),
            [curve for curve in chosen if curve.run.attention in HASHING],
        ),
    }
    for path, (draw, shown) in figures.items():
        if shown:
            draw(path, shown)
    return [path for path, (_, shown) in figures.items() if shown]


def _draw_pairs(path: Path, pairs: list[Pair]) -> None:
    """A panel for each length, a line for each run, and how much sooner than dense each kind is where dense ends."""
    lengths = sorted({dense.run.length for dense, _ in pairs})
    kinds = dict.fromkeys(curve.run.attention for pair in pairs for curve in pair)
    colours = dict(zip(kinds, PAIR_COLOURS, strict=False))
    figure = figure_of(10.4 if len(lengths) > 1 else 6.4, 4.6)
    for ax, length in zip(figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0], lengths, strict=True):
        of_length = [pair for pair in pairs if pair[0].run.length == length]
        for curve in {curve.run: curve for pair in of_length for curve in pair}.values():
            points = [(curve.seconds_at(step), loss) for step, loss in sorted(curve.held_out.items())]
            look = {"color": colours[curve.run.attention], "linewidth": 1.5, "marker": "o", "markersize": 2.5}
            ax.plot(*zip(*points, strict=True), label=curve.run.kind.words, **look)
        said = [(DENSE, "dense's last loss is reached")]
        said += [(colours[kind], how_much_sooner(of_kind)) for kind, of_kind in by_kind(of_length).items()]
        for row, (colour, words) in enumerate(said):
            style = {"ha": "right", "va": "top", "color": colour, "fontweight": "bold", "fontsize": 9}
            ax.annotate(words, (0.98, 0.97 - 0.06 * row), xycoords="axes fraction", **style)
        ax.set_title(f"{length // 1024}k tokens", color=INK)
        ax.set_xlabel("seconds of training", color=INK)
        ax.set_xlim(left=0)
        finish(ax)
    figure.axes[0].set_ylabel("held-out loss, nats a byte", color=INK)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    environments = [curve.environment for pair in pairs for curve in pair]
    legend(figure, dict(zip(labels, handles, strict=True)).values(), *environments, ncols=2)
    finish_figure(figure, f"The same {pairs[0][0].run.steps} steps on enwik8, keys of their own", path)


def _draw_paper(path: Path, curves: list[Curve]) -> None:
    """Loss by step and by time, a column for each text and length, a line for each of the paper's kinds."""
    of_text = by_text(curves)
    figure = figure_of(10.4, 7.2)
    by_step, by_time = figure.subplots(2, len(of_text), sharex="row", sharey=True, squeeze=False)
    for top, bottom, (title, shown) in zip(by_step, by_time, of_text.items(), strict=True):
        for curve in shown:
            look = {"color": PAPER_COLOURS[curve.run.attention], "linewidth": 1.6, "marker": "o", "markersize": 2.5}
            steps = sorted(curve.held_out)
            losses = [curve.held_out[step] for step in steps]
            top.plot(steps, losses, label=curve.run.kind.words, **look)
            bottom.plot([curve.seconds_at(step) for step in steps], losses, **look)
        top.set_title(title, color=INK)
        top.set_xlabel("step", color=INK)
        bottom.set_xlabel("seconds of training", color=INK)
        finish(top)
        finish(bottom)
    for ax in (by_step[0], by_time[0]):
        ax.set_ylabel("held-out loss, nats a byte", color=INK)
    most = max(by_step, key=lambda ax: len(ax.get_lines()))
    legend(figure, most.get_lines(), *(curve.environment for curve in curves), ncols=4)
    finish_figure(figure, "The paper's kinds, keys shared", path)


def _draw_choices(path: Path, curves: list[Curve]) -> None:
    """Final loss and speed, a row for each kind, the best on top."""
    curves = sorted(curves, key=lambda curve: -curve.final["loss"])
    figure = figure_of(10.4, 0.26 * len(curves) + 1.6)
    losses, speeds = figure.subplots(1, 2, sharey=True)
    colours = [SHARED if curve.run.kind.shared else OWN for curve in curves]
    for row, (curve, colour) in enumerate(zip(curves, colours, strict=True)):
        loss = curve.final["loss"]
        losses.plot(min(loss, WORST), row, marker="o" if loss <= WORST else ">", color=colour)
        if loss > WORST:
            losses.annotate(f"{loss:.2f}  ", (WORST, row), ha="right", va="center", fontsize=8, color=colour)
        speeds.plot(curve.tokens_per_second() / 1e3, row, marker="o", color=colour)
    losses.set_yticks(range(len(curves)), [curve.run.kind.words for curve in curves], fontsize=9)
    for ax, label in ((losses, "held-out loss, nats a byte"), (speeds, "thousand tokens a second")):
        ax.set_xlabel(label, color=INK)
        finish(ax)
    speeds.set_xlim(left=0)
    entries = [
        entry(f"{keys} keys", color=colour, marker="o", linestyle="")
        for keys, colour in (("own", OWN), ("shared", SHARED))
    ]
    legend(figure, entries, *(curve.environment for curve in curves), ncols=2)
    run = curves[0].run
    finish_figure(figure, f"What layers see: after {run.steps} steps at {run.length // 1024}k tokens", path)


def _draw_progress(path: Path, curves: list[Curve], dense: Curve | None) -> None:
    """How visible pairs, layer by layer, and step time change as models learn, a column for each kind beside dense."""
    figure = figure_of(3.1 * len(curves) + 0.4, 5.6)
    tops, bottoms = figure.subplots(2, len(curves), sharex=True, sharey="row", squeeze=False)
    for top, bottom, curve in zip(tops, bottoms, curves, strict=True):
        for layer, colour in enumerate(_shades(curve.visible.shape[1])):
            visible = _smoothed(curve.visible[:, layer])
            top.plot(curve.steps, visible, color=colour, linewidth=1.3, label=f"layer {layer + 1}")
        keys = "shared" if curve.run.kind.shared else "own"
        top.set_title(f"{curve.run.kind.words}\n{keys} keys", color=INK, fontsize=10)
        bottom.plot(curve.steps[1:], _step_ms(curve), color=SPARSE, linewidth=1.6)
        if dense is not None:
            bottom.plot(dense.steps[1:], _step_ms(dense), color=DENSE, linewidth=1.6, label=dense.run.kind.words)
        bottom.set_xlabel("step", color=INK)
        finish(top)
        finish(bottom)
    for ax, label in ((tops[0], "share of visible pairs"), (bottoms[0], "ms a step")):
        ax.set_ylabel(label, color=INK)
        ax.set_ylim(bottom=0)
    lines = [*tops[0].get_lines(), *bottoms[0].get_lines()[1:]]
    legend(figure, lines, *(curve.environment for curve in (*curves, *filter(None, [dense]))), ncols=7)
    finish_figure(figure, "Buckets and step time while models learn, medians of 100 steps", path)


def _step_ms(curve: Curve) -> np.ndarray:
    """Milliseconds a step between records."""
    return _smoothed(1e3 * np.diff(curve.seconds) / np.diff(curve.steps))


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Medians of five records, of fewer at both ends."""
    return np.array([np.median(values[max(0, i - 2) : i + 3]) for i in range(len(values))])


def _shades(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](i / max(count - 1, 1)) for i in range(count)]


if __name__ == "__main__":
    draw_from(RESULTS, draw_language)
