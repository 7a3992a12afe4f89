"""One step of training and of evaluation, each a jitted pure function of its state.

Randomness is a function of (seed, step, micro-batch, layer), so nothing but the step has to be saved to go on.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float32, Int32, PRNGKeyArray

from models.documents import document_ids
from models.transformer import LayerStats, Transformer, TransformerConfig
from training.loss import total_cross_entropy

# Streams of randomness that never meet: folded into the run's seed.
_PARAMETERS, _TRAINING, _EVALUATION = range(3)

type Tokens = Int32[Array | np.ndarray, "*batches T1"]


class TrainState(NamedTuple):
    """All that changes while training.

    Attributes:
        step: steps taken, int32.
        params: parameters of the model.
        optimizer: state of the optimizer.
    """

    step: Int32[Array, ""]
    params: nnx.State
    optimizer: optax.OptState


class StepMetrics(NamedTuple):
    """What a step measured.

    Attributes:
        loss: mean over its tokens, before the update, in nats.
        grad_norm: global norm of the gradient, before clipping.
        layers: what each layer's plan saw: the mean share of visible pairs, the sum of overflow.
    """

    loss: Float32[Array, ""]
    grad_norm: Float32[Array, ""]
    layers: LayerStats


def init_state(
    config: TransformerConfig, optimizer: optax.GradientTransformation, seed: int
) -> tuple[nnx.GraphDef, TrainState]:
    """A fresh model and optimizer.

    Returns:
        The model's structure, with which the parameters make a `Transformer` again, and the state.
    """

    @jax.jit
    def init(key):
        model = Transformer(config, rngs=nnx.Rngs(params=key))
        params = nnx.state(model, nnx.Param)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    structure = nnx.graphdef(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(params=0))))
    return structure, init(_key(seed, _PARAMETERS))


def make_train_step(
    structure: nnx.GraphDef, optimizer: optax.GradientTransformation, seed: int, end_token: int | None
) -> Callable[[TrainState, Tokens], tuple[TrainState, StepMetrics]]:
    """Makes the training step, which consumes its state.

    Args:
        structure: of the model.
        optimizer: applied once to the mean gradient of all the micro-batches.
        seed: of the run.
        end_token: token after which a new document begins, where tokens see only their own; else None.

    Returns:
        A function of state and tokens [accumulation, size, length + 1] that gives the next state and metrics.
    """

    def loss(params, tokens, key):
        total, layers = _total_loss(structure, params, tokens, None, key, end_token)
        return total / (tokens.shape[0] * (tokens.shape[1] - 1)), layers

    gradient = jax.value_and_grad(loss, has_aux=True)

    def train_step(state: TrainState, batch: Tokens) -> tuple[TrainState, StepMetrics]:
        key = jax.random.fold_in(_key(seed, _TRAINING), state.step)
        accumulation = batch.shape[0]

        def add(total, micro_batch):
            number, tokens = micro_batch
            (value, layers), grads = gradient(state.params, tokens, jax.random.fold_in(key, number))
            return jax.tree.map(jnp.add, total, (value, grads)), layers

        zeros = jax.tree.map(jnp.zeros_like, (jnp.zeros((), jnp.float32), state.params))
        numbers = jnp.arange(accumulation, dtype=jnp.int32)
        (value, grads), layers = jax.lax.scan(add, zeros, (numbers, batch))
        value, grads = jax.tree.map(lambda x: x / accumulation, (value, grads))
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        params = jax.tree.map(jnp.add, state.params, updates)
        layers = LayerStats(jnp.mean(layers.visible, axis=0), jnp.sum(layers.overflow, axis=0))
        metrics = StepMetrics(value, optax.tree.norm(grads), layers)
        return TrainState(state.step + 1, params, optimizer_state), metrics

    return jax.jit(train_step, donate_argnums=0)


def make_evaluation_step(
    structure: nnx.GraphDef, seed: int, end_token: int | None
) -> Callable[[nnx.State, Tokens, Float32[Array | np.ndarray, "B T"]], Float32[Array, ""]]:
    """Makes a function of parameters, tokens [B length+1] and weights [B length] that sums the weighted losses.

    Hashes and drops come from a fixed key: the same parameters always give the same result.
    """
    return jax.jit(
        lambda params, tokens, weights: _total_loss(
            structure, params, tokens, weights, _key(seed, _EVALUATION), end_token
        )[0]
    )


def _total_loss(structure, params, tokens, weights, key: PRNGKeyArray, end_token: int | None):
    model = nnx.merge(structure, params)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    weights = jnp.ones(targets.shape, jnp.float32) if weights is None else weights
    segment_ids = None if end_token is None else document_ids(inputs, end_token)
    hidden, layers = model.hidden(inputs, key=key, segment_ids=segment_ids)
    return total_cross_entropy(model, hidden, targets, weights), layers


def evaluation_key(seed: int) -> PRNGKeyArray:
    """The key of hashes and drops outside training."""
    return _key(seed, _EVALUATION)


def _key(seed: int, stream: int) -> PRNGKeyArray:
    return jax.random.fold_in(jax.random.key(seed), stream)
