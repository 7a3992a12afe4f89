"""Images that a model draws, pixel after pixel, and sheets that show many of them.

Pixels are tokens 0 to 255 behind a begin token, as in `single_rows.py`. How tokens are drawn is left to
models/decoding.py, and the file to png.py.
"""

from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from jaxtyping import PRNGKeyArray, UInt8

from models.decoding import generate
from models.sampler import Sampler
from models.transformer import Transformer
from training.batches import evenly
from training.config import TrainConfig
from training.data import Corpus
from training.single_rows import SingleRows
from training.step import evaluation_key
from training.tokens import Tokenizer

_LEVELS = 256
_GAP, _GREY = 2, 96  # pixels between images, and what colour they have: neither ink nor background
_SCALE = 3  # pixels of a sheet for one of an image: 28 are too few to look at
_COMPLETED = 10  # images of a run's own sample


def draw_images(
    model: Transformer,
    begun: UInt8[np.ndarray, "B P"],
    shape: tuple[int, int],
    *,
    begin_token: int,
    sampler: Sampler,
    key: PRNGKeyArray,
    pattern_key: PRNGKeyArray,
    count: int | None = None,
) -> UInt8[np.ndarray, "B rows columns"]:
    """Images that go on from these first pixels, or from none.

    Args:
        model: of pixels.
        begun: the first P pixels of each image, row after row; P may be 0.
        shape: rows and columns of an image.
        begin_token: token before the first pixel, which the model is not to draw; if it does, it counts as 0.
        sampler: how a pixel is drawn.
        key: of the choices.
        pattern_key: of hashes and drops.
        count: pixels to draw in each, after which they are 0; default: all that are left.

    Raises:
        NotImplementedError: the model looks ahead, as `generate` says.
    """
    batch, given = begun.shape
    left = shape[0] * shape[1] - given
    wanted = left if count is None else min(count, left)
    prompt = np.concatenate([np.full((batch, 1), begin_token, np.int32), begun], axis=1, dtype=np.int32)
    tokens = np.asarray(generate(model, prompt, wanted, key=key, pattern_key=pattern_key, sampler=sampler))
    drawn = np.where(tokens < _LEVELS, tokens, 0).astype(np.uint8)
    pixels = np.concatenate([begun, drawn, np.zeros((batch, left - wanted), np.uint8)], axis=1)
    return pixels.reshape(batch, *shape)


def complete_held_out(
    config: TrainConfig, structure: nnx.GraphDef, params: nnx.State, corpus: Corpus, tokenizer: Tokenizer
) -> UInt8[np.ndarray, "height width"] | None:
    """A sheet of some held-out images, and below them how their first pixels go on; None where none are asked for.

    Raises:
        NotImplementedError: the model looks ahead, as `generate` says.
    """
    settings = config.sample
    if settings.tokens == 0:
        return None
    assert corpus.image_shape is not None
    rows = SingleRows.of(corpus.held_out.tokens, config.batch.length)
    pixels = np.stack([rows[int(number)][1:] for number in evenly(_COMPLETED, len(rows))]).astype(np.uint8)
    completed = draw_images(
        nnx.merge(structure, params),
        pixels[:, : settings.prompt],
        corpus.image_shape,
        begin_token=tokenizer.end,
        sampler=Sampler(settings.temperature),
        key=jax.random.key(config.seed),
        pattern_key=evaluation_key(config.seed),
        count=settings.tokens,
    )
    return sheet([pixels.reshape(completed.shape), completed])


def sheet(lines: Sequence[UInt8[np.ndarray, "_ rows columns"]]) -> UInt8[np.ndarray, "height width"]:
    """One picture of lines of images; shorter lines leave their end grey."""
    longest = max(map(len, lines))
    padded = [np.pad(line, ((0, longest - len(line)), (0, 0), (0, 0)), constant_values=_GREY) for line in lines]
    grid = np.pad(np.stack(padded), ((0, 0), (0, 0), (_GAP, 0), (_GAP, 0)), constant_values=_GREY)
    down, across, rows, columns = grid.shape
    picture = grid.transpose(0, 2, 1, 3).reshape(down * rows, across * columns)
    picture = np.pad(picture, ((0, _GAP), (0, _GAP)), constant_values=_GREY)
    return picture.repeat(_SCALE, axis=0).repeat(_SCALE, axis=1)
