"""AdamW: warm-up, cosine decay, clipping, decay of matrices only; averages of parameters; updates that are skipped."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int32

from training.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up to the peak, then half a cosine down to its final share."""
    warmup = max(1, round(config.warmup * steps))
    return optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / warmup,
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),
        end_value=config.learning_rate * config.final,
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of so many steps."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
        ),
    )


def averaged(average: Any, params: Any, decay: float, count: Int32[Array, ""]) -> Any:
    """The exponential moving average after one more update.

    Its weights add up to one from the start: after n updates the last parameters have (1 - decay) / (1 - decay^n), as
    by Adam's correction, but made here so that the average is ready for evaluation at any time. The parameters of the
    start count nothing.

    Args:
        average: float32, after the update before; anything finite before the first.
        params: float32, after this update.
        decay: of the weights, an update.
        count: updates so far, this one included.
    """
    share = (1 - decay) / -jnp.expm1(count.astype(jnp.float32) * math.log(decay))
    return optax.incremental_update(params, average, jnp.minimum(share, 1.0))


def updated_where[T](applies: Bool[Array, ""], new: T, old: T) -> T:
    """What an update made, where it applies, else what was there before: but schedules go on.

    Args:
        applies: whether the update is applied.
        new: any tree, states of optimizers included.
        old: the same before the update.
    """
    goes_on = lambda node: isinstance(node, optax.ScaleByScheduleState)

    def choose(new, old):
        return new if goes_on(new) else jnp.where(applies, new, old)

    return jax.tree.map(choose, new, old, is_leaf=goes_on)
