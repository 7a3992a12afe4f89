"""Draws how language models learn: held-out loss by time beside dense attention, and by step for every choice.

`plot.py` calls this where there are results; by itself: python benchmarks/plot_language.py
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from figures import INK, draw_from, figure_of, finish, finish_figure, legend
from language_results import RESULTS, Curve, load_curves, sooner
from language_runs import GROUPS
from language_tables import headline_pairs

SPARSE, DENSE = "#0072B2", INK
HEADLINE, CHOICES, PROGRESS = "language-models.png", "language-choices.png", "language-progress.png"


def draw_language(data: Path, folder: Path) -> list[Path]:
    """Writes those figures into a folder of which there are results, and returns their paths."""
    curves = load_curves(data)
    chosen = [curves[run] for run in GROUPS["choices"] if run in curves]
    figures: dict[Path, tuple[Callable[[Path, list[Any]], None], list[Any]]] = {
        folder / HEADLINE: (_draw_headline, headline_pairs(curves)),
        folder / CHOICES: (_draw_choices, chosen),
        folder / PROGRESS: (_draw_progress, [curve for curve in chosen if _all_hash(curve)]),
    }
    for path, (draw, shown) in figures.items():
        if shown:
            draw(path, shown)
    return [path for path, (_, shown) in figures.items() if shown]


def _draw_headline(path: Path, pairs: list[tuple[Curve, Curve]]) -> None:
    """A panel for each length, a line for each run."""
    lengths = sorted({dense.run.length for dense, _ in pairs})
    figure = figure_of(10.4, 4.4)
    for ax, length in zip(figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0], lengths, strict=True):
        of_length = [pair for pair in pairs if pair[0].run.length == length]
        for pair in of_length:
            for curve, colour in zip(pair, (DENSE, SPARSE), strict=True):
                points = [(curve.seconds_at(step), loss) for step, loss in sorted(curve.held_out.items())]
                ax.plot(
                    *zip(*points, strict=True),
                    color=colour,
                    label=curve.run.kind.words,
                    linewidth=2,
                    marker="o",
                    markersize=3,
                )
        _draw_sooner(ax, of_length[0])
        ax.set_title(f"{length // 1024}k tokens", color=INK)
        ax.set_xlabel("seconds of training", color=INK)
        ax.set_xlim(left=0)
        ax.margins(y=0.1)
        finish(ax)
    figure.axes[0].set_ylabel("held-out loss, nats a byte", color=INK)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    environments = [curve.environment for pair in pairs for curve in pair]
    legend(figure, dict(zip(labels, handles, strict=True)).values(), *environments, ncols=2)
    finish_figure(figure, f"The same {pairs[0][0].run.steps} steps on enwik8, keys of their own", path)


def _draw_sooner(ax: Any, pair: tuple[Curve, Curve]) -> None:
    """Marks the loss that dense has at its last point, and when the other had it."""
    met = sooner(*pair)
    if met is None:
        return
    loss, slow, fast = met
    arrow = {"arrowstyle": "<->", "color": SPARSE, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", (fast, loss), xytext=(slow, loss), arrowprops=arrow)
    style = {"ha": "right", "va": "top", "color": SPARSE, "fontweight": "bold", "fontsize": 9}
    ax.annotate(f"{slow / fast:.1f}x sooner", (slow, loss), xytext=(0, -5), textcoords="offset points", **style)


def _draw_choices(path: Path, curves: list[Curve]) -> None:
    """Loss by step and by time, a line for each kind."""
    figure = figure_of(10.4, 6.2)
    axes = figure.subplots(1, 2, sharey=True)
    for curve, style in zip(curves, _styles(curves), strict=True):
        steps = sorted(curve.held_out)
        losses = [curve.held_out[step] for step in steps]
        label = f"{_titled(curve)}: {curve.final['loss']:.3f}"
        axes[0].plot(steps, losses, label=label, **style)
        axes[1].plot([curve.seconds_at(step) for step in steps], losses, **style)
    axes[0].set_xlabel("step", color=INK)
    axes[1].set_xlabel("seconds of training", color=INK)
    axes[0].set_ylabel("held-out loss, nats a byte", color=INK)
    for ax in axes:
        ax.set_ylim(top=2.9)
        finish(ax)
    legend(figure, axes[0].get_lines(), *(curve.environment for curve in curves), ncols=2)
    finish_figure(figure, f"What layers see, at {curves[0].run.length // 1024}k tokens, and the final loss", path)


def _draw_progress(path: Path, curves: list[Curve]) -> None:
    """How visible pairs, layer by layer, and step time change as models learn."""
    figure = figure_of(10.4, 3.4 * len(curves) + 0.6)
    panels = figure.subplots(len(curves), 2, sharex=True, squeeze=False)
    for (left, right), curve in zip(panels, curves, strict=True):
        for layer, colour in enumerate(_shades(curve.visible.shape[1])):
            left.plot(curve.steps, curve.visible[:, layer], color=colour, linewidth=1.3, label=f"layer {layer + 1}")
        left.set_ylabel("share of visible pairs", color=INK)
        left.set_title(_titled(curve), color=INK, fontsize=10)
        left.set_ylim(bottom=0)
        seconds = (curve.seconds[1:] - curve.seconds[:-1]) / (curve.steps[1:] - curve.steps[:-1])
        right.plot(curve.steps[1:], 1e3 * seconds, color=SPARSE, linewidth=1.6)
        right.set_ylabel("ms a step", color=INK)
        right.set_ylim(bottom=0)
        finish(left)
        finish(right)
    for ax in panels[-1]:
        ax.set_xlabel("step", color=INK)
    legend(figure, panels[0][0].get_lines(), *(curve.environment for curve in curves), ncols=6)
    finish_figure(figure, "Buckets and step time while models learn", path)


def _all_hash(curve: Curve) -> bool:
    """Whether all layers hash."""
    return curve.run.attention.startswith("hash") and "dense" not in curve.run.attention


def _titled(curve: Curve) -> str:
    return f"{curve.run.kind.words}; {'shared' if curve.run.kind.shared else 'own'} keys"


def _styles(curves: Iterable[Curve]) -> list[dict[str, Any]]:
    """Dense in black, others by colour; dashed where keys are shared."""
    from matplotlib import colormaps

    names = [curve.run.attention.removesuffix("-own-keys") for curve in curves]
    sparse = sorted({*names} - {"dense"})
    colours = {name: colormaps["tab10" if len(sparse) <= 10 else "tab20"](i) for i, name in enumerate(sparse)}
    look = {"linewidth": 1.8, "marker": "o", "markersize": 3}
    return [
        look | {"color": colours.get(name, DENSE), "linestyle": (0, (4, 2)) if curve.run.kind.shared else "-"}
        for name, curve in zip(names, curves, strict=True)
    ]


def _shades(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](i / max(count - 1, 1)) for i in range(count)]


if __name__ == "__main__":
    draw_from(RESULTS, draw_language)
