"""Reading what steps measured: to the screen, to the metrics, and the check that training is still sane."""

import math
from typing import NamedTuple

import numpy as np
import optax

from training.config import TrainConfig
from training.errors import NonFiniteLossError
from training.metrics import MetricsLog
from training.progress import TrainProgress
from training.step import StepMetrics
from training.throughput import Throughput


class Report(NamedTuple):
    """Where the measurements of steps go.

    Attributes:
        config: settings of the run.
        schedule: learning rate of each step.
        metrics: JSONL file.
        progress: screen.
        throughput: clock.
    """

    config: TrainConfig
    schedule: optax.Schedule
    metrics: MetricsLog
    progress: TrainProgress
    throughput: Throughput

    def step(self, done: int, measured: StepMetrics) -> None:
        """Reports the step after which `done` are done; waits for that step, not for any later one.

        Raises:
            NonFiniteLossError: its loss or gradient is infinite or not a number, and is not to be skipped, or too many
                before it were, too.
        """
        loss, grad_norm = float(measured.loss), float(measured.grad_norm)
        skipped = None if measured.skipped is None else int(measured.skipped.steps)
        self._check_finite(done, measured)
        batch = self.config.batch
        tokens = batch.accumulation * batch.size * batch.length
        self.throughput.add(tokens)
        # The first step compiles: the clock starts after it.
        self.throughput.resume()
        speed = self.throughput.tokens_per_second
        visible, overflow = np.asarray(measured.layers.visible), int(np.sum(measured.layers.overflow))
        text = f"loss {loss:.3f}  {speed:,.0f} tokens/s  {100 * visible.mean():.1f} % of pairs visible"
        text += f"  {overflow} tokens overflow" if overflow else ""
        text += f"  {skipped} steps skipped" if skipped else ""
        self.progress.step(done, text)
        if done % self.config.log_every == 0 or done == self.config.steps:
            self.metrics.write(
                "train",
                done,
                loss=loss,
                grad_norm=grad_norm,
                learning_rate=float(np.asarray(self.schedule(done - 1))),
                tokens=done * tokens,
                tokens_per_second=speed,
                training_seconds=self.throughput.seconds,
                visible=visible.tolist(),
                overflow=overflow,
                **({} if skipped is None else {"skipped": skipped}),
            )

    def _check_finite(self, done: int, measured: StepMetrics) -> None:
        """Raises where training is not to go on; notes why it ends."""
        loss, grad_norm = float(measured.loss), float(measured.grad_norm)
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return
        why = f"step {done}: loss {loss}, gradient norm {grad_norm}"
        if measured.skipped is not None:
            in_a_row, most = int(measured.skipped.in_a_row), self.config.optimizer.max_skipped
            if in_a_row < most:
                return
            why += f": {in_a_row} steps in a row were skipped, --optimizer.max-skipped is {most}"
        self.metrics.write("end", done, reason="non-finite loss")
        raise NonFiniteLossError(why)
