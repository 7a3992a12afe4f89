"""What the user sees while training: a live bar on a terminal, plain lines elsewhere."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# Where lines are plain, one about every so many seconds.
_SECONDS_BETWEEN_LINES = 10.0


class TrainProgress:
    """Shows steps and messages.

    Args:
        first: steps already taken.
        steps: steps in all.
        console: where to show them.
    """

    def __init__(self, first: int, steps: int, console: Console):
        self._console = console
        self._steps = steps
        self._last_line = 0.0
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=steps, completed=first, text="compiling")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self, done: int, text: str) -> None:
        """Shows a step: so many are done, and this is how it goes."""
        if self._console.is_terminal:
            self._bar.update(self._task, completed=done, text=text)
            return
        now = time.monotonic()
        if done == self._steps or now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            self.say(f"step {done}/{self._steps}  {text}")

    def say(self, message: str) -> None:
        """Shows a message that stays."""
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)
