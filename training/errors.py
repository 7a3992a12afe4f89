"""Errors that end a run with one clear line instead of a traceback."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


class ConfigError(Exception):
    """The settings contradict each other or ask for what does not exist."""


class DataError(Exception):
    """The text is missing, unreadable, wrongly encoded or too short."""


class CheckpointError(Exception):
    """A checkpoint is missing, unreadable or belongs to another run."""


class NonFiniteLossError(Exception):
    """The loss or the gradient became infinite or not a number."""


class OutputError(Exception):
    """A file of the run cannot be written: the disk is full, or the file is not ours."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Says which file it is that cannot be written.

    Raises:
        OutputError: an operating system's error while it is written.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
