"""The settings of a run in its `config.json`, from where it goes on with them."""

import dataclasses
import json
import os
import types
import typing
from pathlib import Path
from typing import Any

from training.config import TrainConfig, as_now
from training.errors import CheckpointError, writing


def write_config(path: Path, config: TrainConfig) -> None:
    """Writes the settings; the file is whole at any time.

    Raises:
        OutputError: it cannot be written.
    """
    unfinished = path.with_suffix(".unfinished")
    with writing(path):
        unfinished.write_text(json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n", "utf-8")
        os.replace(unfinished, path)


def read_config(path: Path) -> TrainConfig:
    """The settings that a run wrote; those that are newer than it have their defaults.

    Raises:
        CheckpointError: they cannot be read.
    """
    try:
        return _made(TrainConfig, json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        hint = "to go on without them, give the preset and the options that the run had"
        raise CheckpointError(f"{path}: not the settings of a run, or damaged: {error}; {hint}") from error


def _made[T](kind: type[T], saved: dict[str, Any]) -> T:
    """A settings class out of what `json` made of it. Settings that are there no more are left out."""
    hints = typing.get_type_hints(kind)
    known = {name: as_now(name, value) for name, value in saved.items() if name in hints}
    return kind(**{name: _value(name, hints[name], value) for name, value in known.items()})


def _value(name: str, hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return _made(typing.cast(type, hint), value)
    if isinstance(value, list):
        value = tuple(value)
    if isinstance(value, str) and Path in typing.get_args(hint):
        value = Path(value)
    if not _is_a(value, hint):
        raise TypeError(f"{name} is {value!r}")
    return value


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a value is of one of the types that settings have."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_is_a(value, part) for part in parts)
    if origin is typing.Literal:
        return value in parts
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_a(item, parts[0]) for item in value)
    if hint is Path:
        return isinstance(value, Path)
    return type(value) is hint or (hint is float and type(value) is int)
