"""Draw images by a trained model: `python -m models.draw runs/mnist-1`.

The command alone: which checkpoint, how many images, and the sheet that shows them. Pixels are drawn in
training/pictures.py.
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro
from jaxtyping import UInt8

from models.sampler import Sampler
from training.batches import evenly
from training.errors import CheckpointError, ConfigError, DataError, OutputError, writing
from training.mnist import read_mnist
from training.pictures import draw_images, sheet
from training.png import write_png
from training.run_folder import saved_run
from training.step import evaluation_key
from training.trained import Trained, load_trained

_COLUMNS = 10
# Streams of randomness that never meet: folded into the seed.
_WHOLE, _COMPLETED = range(2)


@dataclasses.dataclass(frozen=True)
class DrawConfig:
    """Draw images by a model that was trained on images. One PNG shows those that it drew from nothing, in rows of 10,
    and, in three more rows, held-out images, their first halves, and how the model goes on from these."""

    run: tyro.conf.Positional[Path]
    """A run's folder, whose newest checkpoint is taken, or one checkpoint: runs/NAME-1/checkpoints/STEP."""
    count: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 50
    """Images to draw from nothing."""
    completions: int = 10
    """Held-out images to complete, spread evenly over all; 0: none."""
    temperature: float = 1.0
    """1 draws as the model has learned; 0 takes the likeliest value of each pixel."""
    seed: int = 0
    """Decides the choices."""
    out: Path | None = None
    """PNG to write; default: images.png in the run's folder."""
    data_dir: Path | None = None
    """Folder that holds the images, as for train.py; default: the one that the run had."""


def main(arguments: Sequence[str]) -> int:
    """Runs the command line; returns the exit status."""
    config = tyro.cli(DrawConfig, args=list(arguments), prog="models.draw")
    try:
        _check(config)
        run, trained = saved_run(config.run), load_trained(config.run)
        out = config.out or run.root / "images.png"
        held_out = _held_out(config, trained)
        start = time.perf_counter()
        lines = _drawn(config, trained, held_out.shape[1:])
        if config.completions:
            lines += _completed(config, trained, held_out[evenly(config.completions, len(held_out))])
        with writing(out):
            write_png(out, sheet(lines))
    except (CheckpointError, ConfigError, DataError, NotImplementedError, OutputError) as error:
        print(f"models.draw: {error}", file=sys.stderr)
        return 2
    print(f"{out}: {config.count} images by {trained.checkpoint}, in {time.perf_counter() - start:.1f} s")
    return 0


def _check(config: DrawConfig) -> None:
    for name, value, least in (
        ("--count", config.count, 1),
        ("--completions", config.completions, 0),
        ("--seed", config.seed, 0),
    ):
        if value < least:
            raise ConfigError(f"{name} must be at least {least}, got {value}")
    try:
        Sampler(config.temperature)
    except ValueError as error:
        raise ConfigError(f"--{str(error).rstrip('.')}") from error


def _held_out(config: DrawConfig, trained: Trained) -> UInt8[np.ndarray, "N rows columns"]:
    """The held-out images, which also tell what shape images have."""
    data = trained.config.data
    if not data.images:
        raise ConfigError(
            f"{config.run} has learned {data.source}, and no images: python -m models.generate continues it"
        )
    if config.data_dir is not None:
        data = dataclasses.replace(data, folder=config.data_dir)
    held_out = read_mnist(data).held_out
    pixels = held_out[0].size
    if pixels != trained.config.batch.length:
        raise DataError(f"{config.run} has learned images of {trained.config.batch.length} pixels, these have {pixels}")
    return held_out


def _drawn(config: DrawConfig, trained: Trained, shape: tuple[int, int]) -> list[np.ndarray]:
    """Images from nothing, in lines."""
    images = _draw(config, trained, np.zeros((config.count, 0), np.uint8), shape, _WHOLE)
    return [images[first : first + _COLUMNS] for first in range(0, len(images), _COLUMNS)]


def _completed(config: DrawConfig, trained: Trained, images: np.ndarray) -> list[np.ndarray]:
    """Images, their first halves, and what the model makes of these, in lines."""
    pixels = images.reshape(len(images), -1)
    half = pixels.shape[1] // 2
    begun = np.where(np.arange(pixels.shape[1]) < half, pixels, 0).reshape(images.shape).astype(np.uint8)
    completed = _draw(config, trained, pixels[:, :half], images.shape[1:], _COMPLETED)
    return [
        line[first : first + _COLUMNS]
        for first in range(0, len(images), _COLUMNS)
        for line in (images, begun, completed)
    ]


def _draw(
    config: DrawConfig, trained: Trained, begun: np.ndarray, shape: tuple[int, int], stream: int
) -> UInt8[np.ndarray, "B rows columns"]:
    return draw_images(
        trained.model,
        begun,
        shape,
        begin_token=trained.tokenizer.end,
        sampler=Sampler(config.temperature),
        key=jax.random.fold_in(jax.random.key(config.seed), stream),
        pattern_key=evaluation_key(trained.config.seed),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
