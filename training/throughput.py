"""Tokens a second, of training alone: compiling, evaluating, saving do not count; and the most memory it took."""

import time

import jax


def peak_bytes() -> int | None:
    """Most memory that was in use at once on this process's first device; None where the device does not tell."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


class Throughput:
    """A clock that runs while training does.

    Args:
        before: seconds that a run took which this one goes on from.
    """

    def __init__(self, before: float = 0.0):
        self._before = before
        self._tokens = 0
        self._seconds = 0.0
        self._resumed: float | None = None

    def resume(self) -> None:
        """Starts the clock, if it is not running."""
        self._resumed = time.monotonic() if self._resumed is None else self._resumed

    def add(self, tokens: int) -> None:
        """Counts a step that is done; ignored while the clock stands."""
        if self._resumed is not None:
            now = time.monotonic()
            self._seconds += now - self._resumed
            self._resumed = now
            self._tokens += tokens

    def pause(self) -> None:
        """Stops the clock until `resume`."""
        self._resumed = None

    @property
    def seconds(self) -> float:
        """Time that the counted steps took, those before included."""
        return self._before + self._seconds

    @property
    def tokens_per_second(self) -> float:
        """The mean since the clock was made; 0 before the first step."""
        return self._tokens / self._seconds if self._seconds > 0 else 0.0
