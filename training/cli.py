"""The command line: a preset, then any setting by name."""

import sys
from collections.abc import Sequence

import tyro

from training.check import check
from training.config import NEWEST, TrainConfig
from training.errors import ConfigError
from training.presets import PRESETS

DEFAULT_PRESET = "cpu-small"


def parse(arguments: Sequence[str]) -> TrainConfig:
    """The settings that a command line asks for; `--help` and misspelled options leave by SystemExit.

    Args:
        arguments: without the program's name; the first may be a preset.

    Raises:
        ConfigError: the preset is unknown or settings contradict each other.
    """
    rest = list(arguments)
    preset = DEFAULT_PRESET
    if rest and not rest[0].startswith("-"):
        preset = rest.pop(0)
    if preset not in PRESETS:
        raise ConfigError(f"there is no preset {preset!r}; choose one of {', '.join(PRESETS)}")
    config = tyro.cli(
        TrainConfig,
        args=_with_resume_value(rest),
        default=PRESETS[preset][1],
        prog=f"{sys.argv[0].rsplit('/', 1)[-1]} [preset]",
        description=_description(preset),
    )
    check(config)
    return config


def _description(preset: str) -> str:
    lines = [f"  {name:10} {text}" for name, (text, _) in PRESETS.items()]
    return (
        "Train a sparse-attention language model on text.\n\nPresets (the first argument):\n"
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
