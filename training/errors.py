"""Errors that end a run with one clear line instead of a traceback."""


class ConfigError(Exception):
    """The settings contradict each other or ask for what does not exist."""


class DataError(Exception):
    """The text is missing, unreadable, wrongly encoded or too short."""


class CheckpointError(Exception):
    """A checkpoint is missing, unreadable or belongs to another run."""


class NonFiniteLossError(Exception):
    """The loss or the gradient became infinite or not a number."""
