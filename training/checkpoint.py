"""Saving and restoring the whole state, with what it belongs to.

A checkpoint appears under its final name only when it is complete. It holds every array of `TrainState` and a record of
the settings and of the data; going on with others is refused.
"""

import json
import logging
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from training.config import with_defaults
from training.errors import CheckpointError
from training.step import TrainState

_FORMAT = 1


class Checkpoints:
    """The checkpoints of a run; writes happen in the background.

    Args:
        folder: where they lie.
        keep: how many of the newest stay.
        identity: settings and data that a checkpoint belongs to, flat.
    """

    def __init__(self, folder: Path, keep: int, identity: dict[str, Any]):
        # The library's own reports say nothing that the run's do not.
        logging.getLogger("absl").setLevel(logging.ERROR)
        self._identity = identity
        self._last: int | None = None
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        try:
            self._manager = ocp.CheckpointManager(folder.resolve(), options=options)
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot write checkpoints: {error.strerror or error}") from error

    def save(self, state: TrainState, step: int) -> None:
        """Saves the state after so many steps, unless that is done already."""
        if self._last == step:
            return
        # Copies: the next step takes over the state's own memory while this is being written.
        arrays = {name: np.array(leaf) for name, leaf in _named_leaves(state).items()}
        record = {"format": _FORMAT, "step": step, "identity": self._identity}
        try:
            self._manager.save(
                step, args=ocp.args.Composite(state=ocp.args.StandardSave(arrays), record=ocp.args.JsonSave(record))
            )
        except Exception as error:  # the storage library has no common base of its errors
            raise CheckpointError(f"checkpoint of step {step} cannot be written: {_short(error)}") from error
        self._last = step

    @property
    def newest(self) -> int | None:
        """The step of the newest checkpoint."""
        return self._manager.latest_step()

    def wait(self) -> None:
        """Waits for the last write."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # whatever failed in the background
            raise CheckpointError(f"the last checkpoint could not be written: {_short(error)}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Ends the background writer, after its last write; an error on the way out does not hide an earlier one."""
        try:
            self._manager.close()
        except Exception as failed:
            if error is None:
                raise CheckpointError(f"the last checkpoint could not be written: {_short(failed)}") from failed


def restore(checkpoint: Path, like: TrainState, identity: dict[str, Any]) -> TrainState:
    """The state saved in a checkpoint.

    Args:
        checkpoint: the folder of one step.
        like: a state of the same structure.
        identity: settings and data of this run.

    Raises:
        CheckpointError: it cannot be read, or belongs to other settings or data.
    """
    record = _read_record(checkpoint)
    _compare(checkpoint, with_defaults(record["identity"]), identity)
    leaves = _named_leaves(like)
    templates = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
    try:
        with ocp.StandardCheckpointer() as reader:
            arrays = reader.restore((checkpoint / "state").resolve(), templates)
        restored = [jax.device_put(np.asarray(arrays[name])) for name in leaves]
    except Exception as error:  # the storage library has no common base of its errors
        raise CheckpointError(f"{checkpoint}: damaged checkpoint: {_short(error)}") from error
    state = jax.tree.unflatten(jax.tree.structure(like), restored)
    if int(state.step) != record["step"]:
        raise CheckpointError(f"{checkpoint}: damaged checkpoint: it says step {record['step']}, holds {state.step}")
    return state


def saved_identity(checkpoint: Path) -> dict[str, Any]:
    """The settings and data that a checkpoint belongs to; settings that are newer than it have their defaults.

    Raises:
        CheckpointError: it cannot be read.
    """
    return with_defaults(_read_record(checkpoint)["identity"])


def restore_params(checkpoint: Path, like: nnx.State) -> nnx.State:
    """The parameters saved in a checkpoint, alone: the state of the optimizer is not read.

    Args:
        checkpoint: the folder of one step.
        like: their structure, shapes and types.

    Raises:
        CheckpointError: they cannot be read, or are others.
    """
    leaves = _named_leaves(TrainState(jnp.zeros((), jnp.int32), like, ()))
    leaves = {name: leaf for name, leaf in leaves.items() if name.startswith(".params")}
    templates = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
    path = (checkpoint / "state").resolve()
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            saved = reader.metadata(path).item_metadata
            # What is not there would be restored as whatever memory holds.
            for name, leaf in leaves.items():
                if name not in saved or tuple(saved[name].shape) != leaf.shape:
                    raise ValueError(f"no parameters {name} of shape {leaf.shape}")
            arguments = ocp.args.PyTreeRestore(
                templates, ocp.checkpoint_utils.construct_restore_args(templates), partial_restore=True
            )
            arrays = reader.restore(path, args=arguments)
        restored = [jax.device_put(np.asarray(arrays[name])) for name in leaves]
    except Exception as error:  # the storage library has no common base of its errors
        raise CheckpointError(f"{checkpoint}: damaged checkpoint: {_short(error)}") from error
    return jax.tree.unflatten(jax.tree.structure(like), restored)


def _read_record(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / "record" / "metadata"
    try:
        record = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint}: not a checkpoint of this program, or damaged: {_short(error)}") from error
    if not isinstance(record, dict) or not isinstance(record.get("identity"), dict):
        raise CheckpointError(f"{checkpoint}: not a checkpoint of this program")
    if record.get("format") != _FORMAT:
        raise CheckpointError(f"{checkpoint}: format {record.get('format')!r}, this program reads {_FORMAT}")
    return record


def _compare(checkpoint: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    names = [name for name in {**saved, **current} if saved.get(name) != current.get(name)]
    if names:
        shown = "; ".join(f"{name} was {saved.get(name)!r}, now {current.get(name)!r}" for name in names[:4])
        more = f"; and {len(names) - 4} more" if len(names) > 4 else ""
        # The default text is the source of what is installed.
        hint = "; the text is not what it was: name the same --data, and install the same packages for 'python'"
        raise CheckpointError(f"{checkpoint} belongs to another run: {shown}{more}{hint if 'text' in names else ''}")


def _named_leaves(state: TrainState) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."
