"""Several processes, one or more a host, that train as one: how they meet, agree, and stop together.

All run the same program in step. The first alone writes what people read: metrics, samples, plots, the screen; a
checkpoint is written by all, each its own part, so they share a file system.
"""

import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from training.config import DistributedConfig, TrainConfig
from training.errors import ConfigError
from training.stopping import StopRequest


def join(config: DistributedConfig) -> None:
    """Meets the other processes, if there are any; before anything else is asked of JAX.

    Raises:
        ConfigError: the settings are incomplete, or the others do not answer.
    """
    given = {
        "--distributed.coordinator": config.coordinator,
        "--distributed.processes": config.processes,
        "--distributed.process": config.process,
    }
    missing = [name for name, value in given.items() if value is None]
    if config.auto and len(missing) < len(given):
        told = ", ".join(name for name in given if name not in missing)
        raise ConfigError(f"--distributed.auto finds out what {told} would say; give one")
    if not config.auto and len(missing) == len(given):
        return
    if not config.auto and missing:
        raise ConfigError(f"several processes need {' and '.join(missing)}, too")
    if config.process is not None and config.processes is not None and not 0 <= config.process < config.processes:
        raise ConfigError(f"--distributed.process must lie in [0, {config.processes}), got {config.process}")
    if min(config.timeout, config.heartbeat) < 1:
        raise ConfigError("--distributed.timeout and --distributed.heartbeat must be at least 1 second")
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.processes,
            config.process,
            initialization_timeout=config.timeout,
            heartbeat_timeout_seconds=config.heartbeat,
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"cannot meet the other processes: {' '.join(str(error).split())}") from error


def is_first() -> bool:
    """Whether this process speaks for all."""
    return jax.process_index() == 0


def from_first[Value](make: Callable[[], Value], errors: tuple[type[Exception], ...]) -> Value:
    """What the first process makes, on all of them; where it fails with one of the errors, all do."""
    if jax.process_count() == 1:
        return make()
    told: dict = {}
    if is_first():
        try:
            told = {"value": make()}
        except errors as error:
            told = {"error": [type(error).__name__, str(error)]}
    told = json.loads(_broadcast(json.dumps(told)))
    if "error" in told:
        name, text = told["error"]
        raise next(kind for kind in errors if kind.__name__ == name)(text)
    return told["value"]


def check_same(what: str, value: Any) -> None:
    """Refuses to train where processes have different settings, or have read different texts."""
    if from_first(lambda: value, ()) != value:
        raise ConfigError(f"process {jax.process_index()} has another {what} than the first; give all the same options")


def shared_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that all processes must have alike, or one waits for what another does not do."""
    own = {"distributed", "max_minutes", "out", "resume"}
    return json.loads(json.dumps({k: v for k, v in dataclasses.asdict(config).items() if k not in own}, default=str))


def advice() -> str:
    """What to do once a process has failed for a reason that may pass; nothing where there is one alone."""
    return "; the other processes end, too: start all again with --resume" if jax.distributed.is_initialized() else ""


def another_is_gone(error: Exception) -> str:
    """What an error of a collective operation means."""
    return f"another process is gone, or the devices failed: {' '.join(str(error).split())[:300]}"


def leave(status: int) -> NoReturn:
    """Ends this process without waiting for the others, who cannot go on without it and then end, too."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _broadcast(text: str) -> str:
    data = np.frombuffer(text.encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    data = data if is_first() else np.zeros(length, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(data)).tobytes().decode()


class JointStop:
    """A request to stop that one process has is one that all have, after the same step.

    Args:
        stop: this process's own.
    """

    def __init__(self, stop: StopRequest):
        self._stop = stop
        self._asked: jax.Array | None = None
        self._agreed = _NO

    def ask(self) -> None:
        """Tells the others, ahead of a step, so that the devices need not wait for the answer."""
        if jax.process_count() > 1:
            rows = np.full(jax.local_device_count(), self._own(), np.int32)
            sharding = NamedSharding(_all_devices(), PartitionSpec("device"))
            self._asked = _largest(jax.make_array_from_process_local_data(sharding, rows))

    def requested(self) -> bool:
        """Whether to stop now: what was told ahead of the step; of one process, what is so now."""
        self._agreed = self._own() if self._asked is None else int(self._asked)
        return self._agreed > _NO

    @property
    def signalled(self) -> bool:
        """Whether it was a signal, so that what takes long is left out."""
        return self._stop.signalled if self._asked is None else self._agreed == _BY_SIGNAL

    @property
    def reason(self) -> str | None:
        """What asked to stop; None if nothing did."""
        return self._stop.reason or ("request of another process" if self._agreed > _NO else None)

    def _own(self) -> int:
        return _NO if not self._stop.requested() else _BY_SIGNAL if self._stop.signalled else _IN_TIME


_NO, _IN_TIME, _BY_SIGNAL = range(3)


@functools.cache
def _all_devices() -> Mesh:
    return Mesh(np.array(jax.devices()), ("device",))


@jax.jit
def _largest(asked: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(jnp.max(asked), NamedSharding(_all_devices(), PartitionSpec()))
