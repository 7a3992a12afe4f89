"""Ending a run early and in order: a signal or a time limit asks, the loop looks and saves."""

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Notes the first SIGINT or SIGTERM; the second ends the process at once.

    Args:
        max_minutes: time limit from now; None for none.
    """

    def __init__(self, max_minutes: float | None):
        self.reason: str | None = None
        self.signalled = False
        self._deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def requested(self) -> bool:
        """Whether to stop now."""
        if self.reason is None and self._deadline is not None and time.monotonic() >= self._deadline:
            self.reason = "time limit"
        return self.reason is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signalled:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.reason = signal.Signals(number).name
        self.signalled = True
        os.write(1, f"\n{self.reason}: stops and saves after this step; once more ends it at once\n".encode())
