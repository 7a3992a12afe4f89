"""A run of `train.py` for a script to look at: its model and its held-out text."""

from pathlib import Path

from training.data import Stream, load_corpus
from training.errors import CheckpointError, DataError
from training.trained import Trained, load_trained


def load_run(run: Path) -> tuple[Trained, Stream]:
    """Returns the model of a run's newest checkpoint, or of one checkpoint in it, and the run's held-out text.

    Raises:
        SystemExit: if either cannot be read.
    """
    try:
        trained = load_trained(run)
        return trained, load_corpus(trained.config.data, trained.tokenizer, trained.config.batch.length).held_out
    except (CheckpointError, DataError) as error:
        raise SystemExit(str(error)) from None
