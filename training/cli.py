"""The command line: a preset, then any setting by name; a run that goes on has its own settings for a preset."""

import dataclasses
import functools
import sys
from collections.abc import Sequence

import tyro

from training.check import check
from training.config import NEWEST, DistributedConfig, TrainConfig
from training.errors import ConfigError
from training.presets import PRESETS
from training.run_folder import RunFolder, resumed_root
from training.saved_config import read_config

DEFAULT_PRESET = "cpu-small"


def parse(arguments: Sequence[str]) -> TrainConfig:
    """The settings that a command line asks for, checked; see `read_settings`.

    Raises:
        ConfigError: the preset is unknown or settings contradict each other.
        CheckpointError: there is no run to go on with, or its settings cannot be read.
    """
    config = read_settings(arguments)
    check(config)
    return config


def read_settings(arguments: Sequence[str]) -> TrainConfig:
    """The settings that a command line asks for, JAX left alone; `--help` and misspelled options leave by SystemExit.

    Args:
        arguments: without the program's name; the first may be a preset. With `--resume` and no preset, settings that
            are not given are those of the run that goes on.

    Raises:
        ConfigError: the preset is unknown.
        CheckpointError: there is no run to go on with, or its settings cannot be read.
    """
    rest = list(arguments)
    preset, named = DEFAULT_PRESET, bool(rest) and not rest[0].startswith("-")
    if named:
        preset = rest.pop(0)
    if preset not in PRESETS:
        raise ConfigError(f"there is no preset {preset!r}; choose one of {', '.join(PRESETS)}")
    read = functools.partial(
        tyro.cli,
        TrainConfig,
        args=_with_resume_value(rest),
        prog=f"{sys.argv[0].rsplit('/', 1)[-1]} [preset]",
        description=_description(preset),
    )
    config = read(default=PRESETS[preset][1])
    if config.resume is not None and not named:
        run = RunFolder(resumed_root(config), None)
        if run.config.exists():
            saved = read_config(run.config)
            fresh = {"out": None, "resume": None, "max_minutes": None, "distributed": DistributedConfig()}
            config = read(default=dataclasses.replace(saved, **fresh))
        if config.resume == NEWEST:  # by the name that was asked for, not the one that was saved
            config = dataclasses.replace(config, resume=str(run.root))
    return config


def _description(preset: str) -> str:
    lines = [f"  {name:10} {text}" for name, (text, _) in PRESETS.items()]
    return (
        "Train a sparse-attention language model on text, or on pixels.\n\nPresets (the first argument):\n"
        + "\n".join(lines)
        + f"\n\nDefaults below are those of {preset}."
    )


def _with_resume_value(arguments: Sequence[str]) -> list[str]:
    """Gives a bare `--resume` its value, which the parser insists on."""
    result = []
    for index, argument in enumerate(arguments):
        result.append(argument)
        following = arguments[index + 1] if index + 1 < len(arguments) else "-"
        if argument == "--resume" and following.startswith("-"):
            result.append(NEWEST)
    return result
