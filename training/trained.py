"""A trained model, made again out of a run's folder: its settings, its tokenizer and the parameters of a checkpoint."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

from flax import nnx

from models.transformer import Transformer
from training.checkpoint import restore_params, saved_identity
from training.config import TrainConfig, identity
from training.errors import CheckpointError
from training.model import transformer_config
from training.run_folder import saved_run
from training.saved_config import read_config
from training.tokens import Tokenizer, load_tokenizer

# Other settings of a run do not change what its model says.
_OF_MODEL = ("model.", "seed", "batch.length", "data.separate_documents", "data.packing", "optimizer.ema")


class Trained(NamedTuple):
    """A model and what belongs to it.

    Attributes:
        model: with the parameters of the checkpoint, or their average if it has one, and kernels that suit this device.
        tokenizer: of its tokens.
        config: settings of the run.
        checkpoint: the folder of the step.
    """

    model: Transformer
    tokenizer: Tokenizer
    config: TrainConfig
    checkpoint: Path


def load_trained(path: Path) -> Trained:
    """The model of a run's newest checkpoint, or of one checkpoint; neither its text nor its optimizer is read.

    Args:
        path: a run's folder, or the folder of one step in its checkpoints.

    Raises:
        CheckpointError: there is no run or no checkpoint, it cannot be read, or the run's settings are not its own.
        DataError: the tokenizer's file cannot be read.
    """
    run = saved_run(path)
    checkpoint = run.resume_from
    assert checkpoint is not None
    config = read_config(run.config)
    tokenizer = load_tokenizer(config.data.tokenizer)
    saved, settings = saved_identity(checkpoint), identity(config)
    if saved.get("tokenizer", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise CheckpointError(f"{checkpoint} was trained with another tokenizer than {config.data.tokenizer} is now")
    if "structure" in saved:
        raise CheckpointError(f"{checkpoint} is of another model, {saved['structure']}")
    for name, value in settings.items():
        if name.startswith(_OF_MODEL) and saved.get(name) != value:
            raise CheckpointError(
                f"{checkpoint} was trained with {name} {saved.get(name)!r}, {run.config} has {value!r}"
            )
    # What "auto" was where the run began; kernels are those of this device.
    attention = tuple(saved.get("auto", kind) if kind == "auto" else kind for kind in config.model.attention)
    here = dataclasses.replace(config.model, attention=attention, dense_backend="sparse_flash", implementation=None)
    shape = transformer_config(dataclasses.replace(config, model=here), tokenizer.vocab_size)
    structure, like = nnx.split(nnx.eval_shape(lambda: Transformer(shape, rngs=nnx.Rngs(params=0))), nnx.Param)
    model = nnx.merge(structure, restore_params(checkpoint, like, averaged=config.optimizer.ema is not None))
    return Trained(model, tokenizer, config, checkpoint)
