"""How a run is spread over devices: the mesh, and what of it each array is divided over.

    data     sequences of a batch
    fsdp     sequences, too; and parameters, gradients and optimizer state by their width (arXiv 1910.02054)
    context  the tokens of each sequence, in a zigzag; keys are gathered (arXiv 2407.21783), or go round (2310.01889)
    tensor   heads, hidden units of the MLP, and the vocabulary (arXiv 1909.08053)

Losses are those of one device, to float32 rounding: batches, hashes and drops are drawn for the whole batch.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models.transformer import TransformerConfig
from sparse_flash_jax import Context
from sparse_flash_jax.flax.pattern import QK, Dense
from training.batches import Shard
from training.config import Exchange, TrainConfig
from training.errors import ConfigError

AXES = ("data", "fsdp", "context", "tensor")

# By the last names of a parameter's path, which are also those of its moments and its average. Others are whole.
_DIVISION = {
    "embedding": ("tensor", "fsdp"),
    "positions": (None, "fsdp"),
    "query/kernel": ("fsdp", "tensor", None),
    "key/kernel": ("fsdp", "tensor", None),
    "value/kernel": ("fsdp", "tensor", None),
    "query_score/kernel": ("fsdp", "tensor"),
    "key_score/kernel": ("fsdp", "tensor"),
    "out/kernel": ("tensor", None, "fsdp"),
    "up/kernel": ("fsdp", "tensor"),
    "down/kernel": ("tensor", "fsdp"),
}


class Layout(NamedTuple):
    """Where the arrays of a run lie.

    Attributes:
        mesh: devices by `AXES`, or by data alone; None for the default device alone.
        pmap: whether `jax.pmap` runs the step on each device's own sequences; else one `jit` over all devices does.
        exchange: of `Context`, where sequences are divided.
    """

    mesh: Mesh | None
    pmap: bool = False
    exchange: Exchange = "gather"

    def __str__(self) -> str:
        if self.mesh is None:
            return "one device"
        axes = " x ".join(f"{name} {size}" for name, size in self.mesh.shape.items() if size > 1) or "data 1"
        exchange = f", keys by {self.exchange}" if self.mesh.shape.get("context", 1) > 1 else ""
        return f"{axes}{exchange}, by {'pmap' if self.pmap else 'jit'}"

    def training_model(self, config: TransformerConfig) -> TransformerConfig:
        """The model as a training step runs it."""
        if self.pmap:
            patterns = tuple(
                dataclasses.replace(each, axis_name="data") if isinstance(each, QK) else each
                for each in config.patterns
            )
            return dataclasses.replace(config, attention=patterns)
        return self.evaluation_model(config)

    def evaluation_model(self, config: TransformerConfig) -> TransformerConfig:
        """The model as it runs on whole batches, wherever they lie."""
        if self.mesh is None or self.pmap:
            return config
        if self.mesh.shape["context"] == 1:
            return dataclasses.replace(config, stream=self._sharding(self._sequence_axes))
        whole = lambda each: isinstance(each, Dense) and each.backend is not None
        patterns = tuple(dataclasses.replace(each, backend=None) if whole(each) else each for each in config.patterns)
        axes = self._sequence_axes
        context = Context("context", self.exchange, zigzag=True, batch=axes, heads="tensor", mesh=self.mesh)
        stream = self._sharding(axes, "context")
        return dataclasses.replace(config, attention=patterns, stream=stream, context=context)

    def compiled(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """A jitted training step, which consumes its state."""
        if self.pmap:
            return jax.pmap(step, "data", in_axes=(None, 1), out_axes=None, donate_argnums=0)
        return jax.jit(step, donate_argnums=0)

    def mean[T](self, tree: T) -> T:
        """Inside a step: of what the devices found. By `jit` they are one program, which has found it for all."""
        return jax.lax.pmean(tree, "data") if self.pmap else tree

    def sum[T](self, tree: T) -> T:
        """Inside a step: likewise."""
        return jax.lax.psum(tree, "data") if self.pmap else tree

    def kept[State, Metrics](self, state: State, metrics: Metrics) -> tuple[State, Metrics]:
        """Inside a step: its results, the state divided as before and the metrics on every device."""
        if self.mesh is None or self.pmap:
            return state, metrics
        whole = jax.tree.map(lambda _: self._sharding(), metrics)
        return jax.lax.with_sharding_constraint((state, metrics), (self.of_state(state), whole))

    def of_state(self, state: Any) -> Any:
        """The sharding of each array of a training state, or of parameters; None where all is on one device."""
        if self.mesh is None:
            return None
        return jax.tree.map_with_path(lambda path, leaf: self._sharding(*self._division(path, leaf)), state)

    def place(self, batch: Any) -> Any:
        """Puts this process's rows of a training batch, arrays [accumulation, rows, ...], on its devices."""
        if self.mesh is None:
            return batch
        if self.pmap:
            devices = self.mesh.local_mesh.size
            split = lambda x: x.reshape(x.shape[0], devices, -1, *x.shape[2:])
            return jax.tree.map(split, batch)
        sharding = self._sharding(None, self._sequence_axes)
        whole = lambda x: (x.shape[0], x.shape[1] * self.shard.count, *x.shape[2:])
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x, whole(x)), batch)

    def place_whole(self, batch: Any) -> Any:
        """Puts a batch that each process has all of, arrays [rows, ...], on the devices."""
        if self.mesh is None:
            return batch
        sharding = self._sharding(self._sequence_axes)
        return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), batch)

    def whole(self, tree: Any) -> Any:
        """Arrays that lie on many devices, in one piece; all processes take part."""
        fetch = lambda x: np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))
        return tree if self.mesh is None else jax.tree.map(fetch, tree)

    @property
    def shard(self) -> Shard:
        """Which part of a batch's rows this process reads."""
        if self.mesh is None:
            return Shard()
        parts = self.sequence_parts
        held = self._sharding(self._sequence_axes).addressable_devices_indices_map((parts,)).values()
        rows = sorted({index[0].start or 0 for index in held if index is not None})
        if rows != list(range(rows[0], rows[0] + len(rows))) or rows[0] % len(rows):
            raise ConfigError(
                f"a process of mesh {self} would have rows {rows} of {parts}; change the order of its axes"
            )
        return Shard(rows[0] // len(rows), parts // len(rows))

    @property
    def sequence_parts(self) -> int:
        """What the sequences of a batch are divided into."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[name] for name in self._sequence_axes)

    @property
    def _sequence_axes(self) -> tuple[str, ...]:
        return tuple(name for name in ("data", "fsdp") if self.mesh is not None and name in self.mesh.shape)

    def _sharding(self, *division: Any) -> NamedSharding:
        assert self.mesh is not None
        return NamedSharding(self.mesh, PartitionSpec(*division))

    def _division(self, path: Any, leaf: Any) -> tuple[Any, ...]:
        names = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value").split("/")
        known = _DIVISION.get("/".join(names[-2:])) or _DIVISION.get(names[-1])
        if known is None or len(known) != leaf.ndim or self.mesh is None or self.pmap:
            return ()
        # A vocabulary, which is as large as it is, stays whole where it cannot be divided.
        parts = self.mesh.shape
        fits = lambda axis, size: axis is not None and size % parts[axis] == 0
        return tuple(axis if fits(axis, size) else None for axis, size in zip(known, leaf.shape, strict=True))


ONE_DEVICE = Layout(None)


def make_layout(config: TrainConfig) -> Layout:
    """The layout that the settings ask for; by default sequences over all devices, where they divide a batch.

    Raises:
        ConfigError: the mesh is malformed, has not as many devices as there are, or divides what cannot be divided.
    """
    devices, size = jax.device_count(), config.batch.size
    if config.mesh is None:
        if size % devices and jax.process_count() > 1:
            raise ConfigError(
                f"--batch-size {size} cannot be divided over {devices} devices; change it, or give --mesh"
            )
        axes = {"data": 1 if size % devices else devices}
    else:
        axes = _parse(config.mesh)
    count = math.prod(axes.values())
    if count > devices or (jax.process_count() > 1 and count != devices):
        raise ConfigError(f"--mesh {config.mesh} takes {count} devices, there are {devices}; name another with --mesh")
    _check(config, axes)
    if count == 1 and config.parallel == "jit":
        return ONE_DEVICE
    names = ("data",) if config.parallel == "pmap" else AXES  # as pmap's own mesh is
    shape, types = tuple(axes.get(name, 1) for name in names), (jax.sharding.AxisType.Auto,) * len(names)
    mesh = jax.make_mesh(shape, names, axis_types=types, devices=jax.devices()[:count])
    return Layout(mesh, config.parallel == "pmap", config.exchange)


def _parse(text: str) -> dict[str, int]:
    axes: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*(\d+)\s*", part)
        if match is None or match[1] not in AXES or match[1] in axes or int(match[2]) < 1:
            raise ConfigError(f"--mesh {text}: expected AXIS=DEVICES,... of {', '.join(AXES)}, as in data=2,tensor=4")
        axes[match[1]] = int(match[2])
    return axes


def _check(config: TrainConfig, axes: dict[str, int]) -> None:
    model, batch = config.model, config.batch
    if config.parallel == "pmap" and jax.process_count() > 1:
        raise ConfigError("--parallel pmap runs in one process; leave it out for several")
    if config.parallel == "pmap" and {*axes} - {"data"}:
        raise ConfigError(f"--parallel pmap takes a mesh of data alone, got {config.mesh}; leave it out for the others")
    sequences = axes.get("data", 1) * axes.get("fsdp", 1)
    key_heads = model.heads if model.key_heads is None else model.key_heads
    context = axes.get("context", 1)
    if context > 1:
        _check_divided_sequences(config, context)
    for name, value, parts in (
        ("--batch-size", batch.size, sequences),
        ("--model.width", model.width, axes.get("fsdp", 1)),
        ("--model.heads", model.heads, axes.get("tensor", 1)),
        ("--model.key-heads", key_heads, axes.get("tensor", 1)),
        ("the hidden size of the MLP", model.mlp_ratio * model.width, axes.get("tensor", 1)),
    ):
        if value % parts:
            raise ConfigError(f"--mesh {config.mesh}: {name} {value} cannot be divided by {parts}")


def _check_divided_sequences(config: TrainConfig, parts: int) -> None:
    where = f"--mesh {config.mesh} divides sequences"
    for name, length in (
        ("--length", config.batch.length),
        *(("--evaluation.lengths", length) for length in config.evaluation.lengths),
    ):
        if length % (2 * parts):
            raise ConfigError(
                f"{where}: {name} {length} cannot be divided by {2 * parts}, twice the devices of context"
            )
    if "hash" in config.model.attention and config.model.centred:
        raise ConfigError(f"{where}: --centred takes means over whole ones; leave it out")
    if "hash" in config.model.attention and (config.model.rounds > 1 or config.model.near is not None):
        raise ConfigError(f"{where}: --model.rounds and --model.near take whole ones; leave them out")
    if "window" in config.model.attention and config.model.sinks:
        raise ConfigError(f"{where}: windows with sinks take whole ones; give --model.sinks 0")
    if "block_top_k" in config.model.attention:
        raise ConfigError(f"{where}: --attention block_top_k takes whole ones; choose another kind")
    if "dense" in config.model.attention and config.model.dense_backend != "sparse_flash":
        raise ConfigError(f"{where}: --model.dense-backend {config.model.dense_backend} takes whole ones; leave it out")
