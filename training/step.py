"""One step of training and of evaluation, each a jitted pure function of its state.

Randomness is a function of (seed, step, micro-batch, layer), so nothing but the step has to be saved to go on.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float32, Int32, PRNGKeyArray

from models.documents import document_ids
from models.transformer import LayerStats, Transformer, TransformerConfig
from training.loss import total_cross_entropy
from training.mesh import ONE_DEVICE, Layout
from training.optimizer import averaged, updated_where
from training.packing import counted, unpack

# Streams of randomness that never meet: folded into the run's seed.
_PARAMETERS, _TRAINING, _EVALUATION = range(3)

type Tokens = Int32[Array | np.ndarray, "*batches T1"]


class Skipped(NamedTuple):
    """Steps whose update was not applied, as their loss or gradient was not finite.

    Attributes:
        steps: how many, int32.
        in_a_row: how many since the last update that was applied, int32.
    """

    steps: Int32[Array, ""]
    in_a_row: Int32[Array, ""]


class TrainState(NamedTuple):
    """All that changes while training.

    Attributes:
        step: steps taken, int32.
        params: parameters of the model.
        optimizer: state of the optimizer, its means in float32.
        ema: float32 average of the parameters; None where none is kept.
        skipped: steps whose update was not applied; None where every update is.
    """

    step: Int32[Array, ""]
    params: nnx.State
    optimizer: optax.OptState
    ema: nnx.State | None = None
    skipped: Skipped | None = None


def evaluation_params(state: TrainState) -> nnx.State:
    """The parameters to evaluate and sample with: their average where one is kept."""
    return state.params if state.ema is None else state.ema


class StepMetrics(NamedTuple):
    """What a step measured.

    Attributes:
        loss: mean over its tokens, before the update, in nats.
        grad_norm: global norm of the gradient, before clipping.
        layers: what each layer's plan saw: the mean share of visible pairs, the sum of overflow.
        skipped: as in the state after the step.
    """

    loss: Float32[Array, ""]
    grad_norm: Float32[Array, ""]
    layers: LayerStats
    skipped: Skipped | None = None


def structure_of(config: TransformerConfig) -> nnx.GraphDef:
    """The model's structure, with which parameters make a `Transformer` again."""
    return nnx.graphdef(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(params=0))))


def init_state(
    config: TransformerConfig,
    optimizer: optax.GradientTransformation,
    seed: int,
    layout: Layout = ONE_DEVICE,
    *,
    average: bool = False,
    skip_non_finite: bool = False,
) -> tuple[nnx.GraphDef, TrainState]:
    """A fresh model and optimizer, on the devices of the layout.

    Args:
        config: of the model.
        optimizer: its state is made for the parameters.
        seed: of the run.
        layout: of the devices.
        average: whether an average of the parameters is kept.
        skip_non_finite: whether updates of steps that are not finite are skipped, and counted.

    Returns:
        The model's structure, and the state.
    """

    def init(key):
        model = Transformer(config, rngs=nnx.Rngs(params=key))
        params = nnx.state(model, nnx.Param)
        zero = jnp.zeros((), jnp.int32)
        return TrainState(
            step=zero,
            params=params,
            optimizer=optimizer.init(_float32(params)),
            ema=_float32(params) if average else None,
            skipped=Skipped(zero, zero) if skip_non_finite else None,
        )

    key = _key(seed, _PARAMETERS)
    shardings = layout.of_state(jax.eval_shape(init, key))
    return structure_of(config), jax.jit(init, out_shardings=shardings)(key)


def make_train_step(
    structure: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    seed: int,
    end_token: int | None,
    layout: Layout = ONE_DEVICE,
    *,
    ema: float | None = None,
    packed: bool = False,
    fixed_draws: bool = False,
) -> Callable[[TrainState, Tokens], tuple[TrainState, StepMetrics]]:
    """Makes the training step, which consumes its state.

    Args:
        structure: of the model.
        optimizer: applied once to the mean gradient of all the micro-batches.
        seed: of the run.
        end_token: token after which a new document begins, where tokens see only their own; else None.
        layout: of the devices; the structure is that of its `training_model`.
        ema: decay of the average of the parameters, for states that keep one.
        packed: batches are rows of `PackedRows`, which say themselves what belongs together and what counts.
        fixed_draws: whether hashes and drops are those of evaluation, the same in every step.

    Returns:
        A function of state and tokens [accumulation, size, length + 1], as the layout places them, that gives the next
        state and metrics. Where the state counts skipped steps, an update whose loss or gradient norm is not finite
        changes neither parameters nor any mean of them or of gradients; the step and the schedule go on.
    """

    def loss(params, tokens, key, count):
        total, layers = _total_loss(structure, params, tokens, None, key, end_token, packed)
        return total / count, layers

    gradient = jax.value_and_grad(loss, has_aux=True)

    def train_step(state: TrainState, batch: Tokens) -> tuple[TrainState, StepMetrics]:
        key = jax.random.fold_in(_key(seed, _TRAINING), state.step)
        accumulation = batch.shape[0]
        # Of a micro-batch, on average: the step's loss is the mean over all its targets.
        targets = batch.shape[1] * (batch.shape[2] - 1)
        count = layout.mean(jnp.sum(counted(batch))) / accumulation if packed else targets

        def add(total, micro_batch):
            number, tokens = micro_batch
            draws = evaluation_key(seed) if fixed_draws else jax.random.fold_in(key, number)
            (value, layers), grads = gradient(state.params, tokens, draws, count)
            return jax.tree.map(jnp.add, total, (value, _float32(grads))), layers

        zeros = jnp.zeros((), jnp.float32), optax.tree.zeros_like(state.params, dtype=jnp.float32)
        numbers = jnp.arange(accumulation, dtype=jnp.int32)
        (value, grads), layers = jax.lax.scan(add, zeros, (numbers, batch))
        value, grads = jax.tree.map(lambda x: x / accumulation, (value, grads))
        value, grads = layout.mean((value, grads))
        updates, optimizer_state = optimizer.update(grads, state.optimizer, _float32(state.params))
        params = optax.apply_updates(state.params, updates)
        after = state._replace(step=state.step + 1, params=params, optimizer=optimizer_state)
        if ema is not None:
            count = after.step if state.skipped is None else after.step - state.skipped.steps
            after = after._replace(ema=averaged(state.ema, _float32(params), ema, count))
        norm = optax.tree.norm(grads)
        if state.skipped is not None:
            after = _after_finite(jnp.isfinite(value) & jnp.isfinite(norm), after, state, state.skipped)
        visible, overflow = jnp.mean(layers.visible, axis=0), jnp.sum(layers.overflow, axis=0)
        layers = LayerStats(layout.mean(visible), layout.sum(overflow))
        return layout.kept(after, StepMetrics(value, norm, layers, after.skipped))

    return layout.compiled(train_step)


def _after_finite(finite: Bool[Array, ""], after: TrainState, before: TrainState, skipped: Skipped) -> TrainState:
    """The state after a step that has updated it only where it was finite; a step it was all the same."""
    missed = 1 - finite.astype(jnp.int32)
    skipped = Skipped(skipped.steps + missed, (skipped.in_a_row + 1) * missed)
    return updated_where(finite, after, before)._replace(step=after.step, skipped=skipped)


def make_evaluation_step(
    structure: nnx.GraphDef, seed: int, end_token: int | None, *, packed: bool = False
) -> Callable[..., Float32[Array, ""]]:
    """Makes a function of parameters, tokens [B length+1] and weights [B length] that sums the weighted losses.

    Hashes and drops come from a fixed key: the same parameters always give the same result. `key=` gives another.
    """

    @jax.jit
    def evaluation_step(params, tokens, weights, key: PRNGKeyArray | None = None):
        key = evaluation_key(seed) if key is None else key
        return _total_loss(structure, params, tokens, weights, key, end_token, packed)[0]

    return evaluation_step


def _total_loss(structure, params, tokens, weights, key: PRNGKeyArray, end_token: int | None, packed: bool):
    model = nnx.merge(structure, params)
    if packed:
        tokens, segment_ids, counts = unpack(tokens)
        weights = counts if weights is None else weights
    else:
        segment_ids = None if end_token is None else document_ids(tokens[:, :-1], end_token)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    weights = jnp.ones(targets.shape, jnp.float32) if weights is None else weights
    inputs, targets, weights, segment_ids = map(model.config.laid_out, (inputs, targets, weights, segment_ids))
    hidden, layers = model.hidden(inputs, key=key, segment_ids=segment_ids)
    return total_cross_entropy(model, hidden, targets, weights), layers


def _float32(tree: Any) -> Any:
    """What is added up over steps or micro-batches is float32, whatever the parameters are."""
    return optax.tree.cast(tree, jnp.float32)


def evaluation_key(seed: int) -> PRNGKeyArray:
    """The key of hashes and drops outside training."""
    return _key(seed, _EVALUATION)


def _key(seed: int, stream: int) -> PRNGKeyArray:
    return jax.random.fold_in(jax.random.key(seed), stream)
