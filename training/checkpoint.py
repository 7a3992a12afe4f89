"""Saving and restoring the whole state, with what it belongs to.

A checkpoint appears under its final name only when it is complete. It holds every array of `TrainState` and a record of
the settings, of the data and of each array's checksum; going on with others, or with arrays that changed, is refused.
"""

import contextlib
import json
import logging
import os
import re
import sys
import zlib
from collections.abc import Iterator
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
from training.run_folder import steps_in
from training.step import Skipped, TrainState

_FORMAT = 1


class Checkpoints:
    """The checkpoints of a run; writes happen in the background.

    Args:
        folder: where they lie.
        keep: how many of the newest stay.
        identity: settings and data that a checkpoint belongs to, flat.
    """

    def __init__(self, folder: Path, keep: int, identity: dict[str, Any]):
        _silence_storage()
        self._folder = folder
        self._identity = identity
        self._last: int | None = None
        self._quiet = _quiet_loops()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        try:
            self._manager = ocp.CheckpointManager(folder.resolve(), options=options)
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot write checkpoints: {error.strerror or error}") from error

    def save(self, state: TrainState, step: int) -> None:
        """Saves the state after so many steps, unless that is done already.

        Raises:
            CheckpointError: it, or the one before it, cannot be written.
        """
        if self._last == step:
            return
        self.wait()
        # Copies: the next step takes over the state's own memory while this is being written.
        copy = lambda leaf: np.array(leaf) if _is_here(leaf) else jnp.copy(leaf)
        arrays = {name: copy(leaf) for name, leaf in _named_leaves(state).items()}
        sums = {name: _checksum(array) for name, array in arrays.items() if isinstance(array, np.ndarray)}
        record = {"format": _FORMAT, "step": step, "identity": self._identity, "checksums": sums}
        try:
            self._manager.save(
                step, args=ocp.args.Composite(state=ocp.args.StandardSave(arrays), record=ocp.args.JsonSave(record))
            )
        except Exception as error:  # the storage library has no common base of its errors
            raise self._unwritten(step, error) from error
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
            raise self._unwritten(self._last, error) from error

    def _unwritten(self, step: int | None, error: Exception) -> CheckpointError:
        whole = steps_in(self._folder.parent)
        left = f"; {self._folder / str(whole[-1])} is there to go on from" if whole else ""
        return CheckpointError(f"checkpoint of step {step} cannot be written: {_short(error)}{left}")

    def __enter__(self) -> Self:
        self._quiet.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Ends the background writer, after its last write; an error on the way out does not hide an earlier one."""
        if error is not None and jax.process_count() > 1:
            return  # the writer may be waiting for a process that is gone
        try:
            self._manager.close()
        except Exception as failed:
            if error is None:
                raise self._unwritten(self._last, failed) from failed
        else:
            if error is None:
                self._quiet.__exit__(None, None, None)


def restore(checkpoint: Path, like: TrainState, identity: dict[str, Any]) -> TrainState:
    """The state saved in a checkpoint.

    Args:
        checkpoint: the folder of one step.
        like: a state of the same structure, divided over devices as the restored one is to be.
        identity: settings and data of this run.

    Raises:
        CheckpointError: it cannot be read, or belongs to other settings or data.
    """
    record = _read_record(checkpoint)
    saved = with_defaults(record["identity"])
    # Of older checkpoints the text alone tells which tokenizer it was.
    _compare(checkpoint, saved, {name: x for name, x in identity.items() if name in saved or name != "tokenizer"})
    checksums = record.get("checksums", {})  # older checkpoints have none
    zero = jnp.zeros((), jnp.int32)
    counts = Skipped(zero, zero) if like.skipped is None else like.skipped
    held = like._replace(skipped=counts if any(name.startswith(".skipped") for name in checksums) else None)
    arrays = _read_arrays(checkpoint, held, checksums)
    state = jax.tree.unflatten(jax.tree.structure(held), map(_placed, arrays, jax.tree.leaves(held)))
    if int(state.step) != record.get("step"):
        raise _damaged(checkpoint, f"it says step {record.get('step')}, holds {state.step}")
    # A run may begin to skip, from a count of 0, or no longer do so.
    return state if (held.skipped is None) == (like.skipped is None) else state._replace(skipped=like.skipped)


def _read_arrays(checkpoint: Path, held: TrainState, checksums: dict[str, int]) -> list[np.ndarray]:
    """The arrays of a checkpoint that holds a state like this one, each as it was when it was saved."""
    _silence_storage()
    templates = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in _named_leaves(held).items()}
    try:
        with _quiet_loops(), ocp.StandardCheckpointer() as reader:
            arrays = reader.restore((checkpoint / "state").resolve(), templates)
    except Exception as error:  # the storage library has no common base of its errors
        raise _damaged(checkpoint, _short(error)) from error
    for name, template in templates.items():
        changed = name in checksums and checksums[name] != _checksum(arrays[name])
        if changed or arrays[name].shape != template.shape:
            raise _damaged(checkpoint, f"{name} is not what was saved")
    return [arrays[name] for name in templates]


def _silence_storage() -> None:
    """The library's own reports say nothing that the run's do not, but in pages of tracebacks."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


@contextlib.contextmanager
def _quiet_loops() -> Iterator[None]:
    """Keeps off the screen what is no news: after the first read or write that fails, the others' loop is closed.

    They say so for a while, so where an error ends this, it stays as it is.
    """
    before = sys.unraisablehook

    def report(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            before(unraisable)

    sys.unraisablehook = report
    yield
    sys.unraisablehook = before


def _is_here(leaf: jax.Array | np.ndarray) -> bool:
    """Whether this process has all of an array."""
    return isinstance(leaf, np.ndarray) or leaf.is_fully_addressable or leaf.is_fully_replicated


def _placed(array: np.ndarray, like: Any) -> jax.Array:
    if not isinstance(like, jax.Array):
        return jnp.asarray(array)
    return jax.make_array_from_callback(array.shape, like.sharding, lambda index: array[index])


def saved_identity(checkpoint: Path) -> dict[str, Any]:
    """The settings and data that a checkpoint belongs to; settings that are newer than it have their defaults.

    Raises:
        CheckpointError: it cannot be read.
    """
    return with_defaults(_read_record(checkpoint)["identity"])


def restore_params(checkpoint: Path, like: nnx.State, *, averaged: bool = False) -> nnx.State:
    """The parameters saved in a checkpoint, alone: the state of the optimizer is not read.

    Args:
        checkpoint: the folder of one step.
        like: their structure, shapes and types.
        averaged: whether to read their average instead, in float32.

    Raises:
        CheckpointError: they cannot be read, or are others.
    """
    average = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), like)
    leaves = _named_leaves(TrainState(jnp.zeros((), jnp.int32), like, (), ema=average))
    leaves = {name: leaf for name, leaf in leaves.items() if name.startswith(".ema" if averaged else ".params")}
    checksums = _read_record(checkpoint).get("checksums", {})
    templates = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
    path = (checkpoint / "state").resolve()
    _silence_storage()
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
            for name in leaves:
                if name in checksums and checksums[name] != _checksum(np.asarray(arrays[name])):
                    raise ValueError(f"{name} is not what was saved")
        restored = [jax.device_put(np.asarray(arrays[name])) for name in leaves]
    except Exception as error:  # the storage library has no common base of its errors
        raise CheckpointError(f"{checkpoint}: damaged checkpoint: {_short(error)}") from error
    return jax.tree.unflatten(jax.tree.structure(like), restored)


def _read_record(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / "record" / "metadata"
    try:
        record = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(checkpoint, f"no record of a checkpoint of this program: {_short(error)}") from error
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
        hint = (
            "; the text has changed, or its tokens: name the same --data, unchanged, and the same --tokenizer, and"
            " install the same packages for 'python'"
        )
        raise CheckpointError(f"{checkpoint} belongs to another run: {shown}{more}{hint if 'text' in names else ''}")


def _damaged(checkpoint: Path, what: str) -> CheckpointError:
    """An error that says which checkpoint before this one there is to go on from."""
    older = [step for step in steps_in(checkpoint.parent.parent) if str(step) != checkpoint.name]
    hint = f"; delete it to go on from {checkpoint.parent / str(older[-1])}" if older else ""
    return CheckpointError(f"{checkpoint}: damaged checkpoint: {what}{hint}")


def _checksum(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _named_leaves(state: TrainState) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    # The storage library tells all that it was about to do, and somewhere what the operating system said.
    if code := re.search(r"os_error_code='(\d+)'", text):
        return os.strerror(int(code[1]))
    return text if len(text) <= 200 else f"{text[:200]}..."
