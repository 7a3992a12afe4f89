"""The loss curve as a picture, where matplotlib is installed."""

import importlib.util
from pathlib import Path

from training.metrics import read_metrics


def plot_loss(metrics: Path, picture: Path, unigram: float | None) -> bool:
    """Draws training and held-out loss over steps.

    Args:
        metrics: JSONL file of the run.
        picture: PNG to write.
        unigram: held-out loss of the unigram model, nats a token.

    Returns:
        Whether a picture was drawn: False without matplotlib or without steps.
    """
    records = read_metrics(metrics)
    train = [(record["step"], record["loss"]) for record in records if record["kind"] == "train"]
    held_out = [(record["step"], record["loss"]) for record in records if record["kind"] in ("evaluation", "final")]
    if not train or importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(*zip(*train, strict=True), label="training", linewidth=1)
    if held_out:
        axes.plot(*zip(*held_out, strict=True), label="held out", marker="o")
    if unigram is not None:
        axes.axhline(unigram, label="unigram, held out", color="gray", linestyle="--")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=150)
    return True
