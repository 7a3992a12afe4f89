"""Attention in which each query sees one run of keys: the gradient rule.

Knows runs and nothing else of sparsity. The implementations compute forward, dQ and dK/dV; what they share is here,
and so is the way of rows into slot order and back, which backward passes go through too.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32

from sparse_flash_jax.kernels.alibi import Alibi
from sparse_flash_jax.kernels.config import Config
from sparse_flash_jax.kernels.implementations import (
    check_block_sizes,
    check_implementation,
    default_config,
    kernels_of,
    order_to_write,
    pick_implementation,
    reads_in_place,
    whole_slots,
    within_runs,
)
from sparse_flash_jax.kernels.padding import extend_bounds
from sparse_flash_jax.kernels.repeats import NO_REPEATS, Repeats
from sparse_flash_jax.kernels.rows import row_kernels, sum_of_products, to_positions, to_slots, to_slots_with_delta
from sparse_flash_jax.kernels.tiles import LOWEST, Runs
from sparse_flash_jax.manual_axes import vary_alike
from sparse_flash_jax.partitioning import by_batch_and_head
from sparse_flash_jax.permute import Permutation, identity

RESIDUAL_NAMES = ("sparse_attention_o", "sparse_attention_lse")
"""`checkpoint_name`s of o and lse: a remat policy that saves them does not run the forward kernel twice."""

ROWS_NAME = "sparse_attention_rows"
"""`checkpoint_name` of q, k and v by slot, or by position where kernels read them in place: a remat policy that saves
them, too, does not make them twice."""

# Axes of q, k and v as `by_batch_and_head` has them.
_BY_POSITION, _BY_SLOT = ("b-n-", "b-k-", "b-k-"), ("bn--", "bk--", "bk--")


class Scores(NamedTuple):
    """What becomes of products before the softmax; static."""

    scale: float
    soft_cap: float | None


def interval_attention(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    runs: Runs,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    implementation: str | None = None,
    config: Config | None = None,
    long_runs: bool = False,
) -> tuple[Float[Array, "B N T H"], Float32[Array, "B N T"]]:
    """Returns attention of each query over its run of keys, differentiable in q, k and v, through o and lse.

    Args:
        q: float [B N T H], in slot order.
        k: float [B K S H], in slot order; K divides N.
        v: float [B K S H].
        runs: the run of each query, and its transpose.
        scale: static factor on the scores; None for 1 / sqrt(H).
        soft_cap: static bound of the scores, which become soft_cap * tanh(score / soft_cap); None for none.
        implementation: "mosaic", "triton" or "xla"; None picks for the device.
        config: tile sizes, `HopperBlocks` for "mosaic" and `Blocks` for the others; None for those that suit the shapes
            and the device. `Config.interpret` runs GPU kernels in Pallas' interpreter, on any device.
        long_runs: whether runs span many tiles, which decides between tiles.

    Returns:
        o [B N T H] in q's dtype, 0 where a run is empty, and lse float32 [B N T], natural log, -inf there.

    Raises:
        ValueError: if the implementation is unknown.
        NotImplementedError: if the named implementation cannot do it.
    """
    options = {"implementation": implementation, "config": config, "long_runs": long_runs}
    return _call(q, k, v, runs, None, scale=scale, soft_cap=soft_cap, **options)


def permuted_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    runs: Runs,
    queries: Permutation | None,
    keys: Permutation | None,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    implementation: str | None = None,
    config: Config | None = None,
    long_runs: bool = False,
    alibi: Alibi | None = None,
    repeats: Repeats = NO_REPEATS,
) -> tuple[Float[Array, "B T N H"], Float32[Array, "B N Tc"]]:
    """Returns `interval_attention` of rows by position: into slot order, and o back.

    For the backward pass it keeps q, k and v in slot order, and o by position: all by position where a plan sorts
    nothing and the kernels read rows in place.

    Args:
        q: float [B T N H].
        k: float [B S K H]; K divides N.
        v: float [B S K H].
        runs: as in `interval_attention`, by slot.
        queries: slots of the queries; None where slots are positions.
        keys: slots of the keys.
        scale: as in `interval_attention`.
        soft_cap: as in `interval_attention`.
        implementation: as in `interval_attention`.
        config: as in `interval_attention`.
        long_runs: as in `interval_attention`.
        alibi: constants by which scores fall with distance, after the cap; None of no slopes.
        repeats: pairs within the runs that are hidden: those of earlier rounds.

    Returns:
        o [B T N H] in q's dtype, 0 where a query has no slot or its run is empty; and lse float32 [B N Tc], by slot.

    Raises:
        ValueError, NotImplementedError: as `interval_attention`.
    """
    options = {"implementation": implementation, "config": config, "long_runs": long_runs}
    options |= {"alibi": alibi, "repeats": repeats}
    return _call(q, k, v, runs, (queries, keys), scale=scale, soft_cap=soft_cap, **options)


def _call(q, k, v, runs, orders, *, scale, soft_cap, implementation, config, long_runs, alibi=None, repeats=NO_REPEATS):
    check_implementation(implementation, q.dtype, q.shape[-1], config)
    if implementation is None:
        implementation = pick_implementation(q.dtype, q.shape[-1], config, runs)
    if runs.blocks is not None:
        check_block_sizes(implementation, runs.blocks.sizes)
    by_pair = alibi is not None or bool(repeats.rows)
    if config is None:
        config = default_config(implementation, dtype=q.dtype, head_dim=q.shape[-1], runs=runs, long_runs=long_runs)
        config = dataclasses.replace(config, fused=False) if by_pair else config
    elif config.fused and (by_pair or not runs.plain):
        raise ValueError(
            "config.fused takes plans of one run for each query, without blocks, no slopes and one round; "
            "leave fused out."
        )
    else:
        config = within_runs(config, runs, q.shape[-1])
    lengths = q.shape[1], k.shape[1]
    in_place = orders == (None, None) and reads_in_place(implementation, config, lengths, q.shape[3])
    if in_place:
        orders = None
    elif orders is not None and row_kernels(implementation, interpret=config.interpret) is not None:
        # Kernels change the layout as they move rows, several arrays a launch, though slots be positions.
        orders = tuple(identity(x.shape[1]) if side is None else side for x, side in zip((q, k), orders, strict=True))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    operands = vary_alike((q, k, v, runs, orders, alibi, repeats))
    scores = Scores(scale, None if soft_cap is None else float(soft_cap))
    return _attention(*operands, scores, implementation, config, in_place)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8, 9, 10))
def _attention(q, k, v, runs, orders, alibi, repeats, scores, implementation, config, in_place):
    return _forward(q, k, v, runs, orders, alibi, repeats, scores, implementation, config, in_place)[0]


def _forward(q, k, v, runs, orders, alibi, repeats, scores, implementation, config, in_place):
    if orders is not None:
        rows = row_kernels(implementation, interpret=config.interpret)
        q, k, v = _to_slots(q, k, v, orders, rows, whole_slots(implementation))
    if orders is not None or in_place:
        q, k, v = (checkpoint_name(x, ROWS_NAME) for x in (q, k, v))
    o, lse = _attend(q, k, v, runs, orders, alibi, repeats, scores, implementation, config, in_place)
    o, lse = (checkpoint_name(x, name) for x, name in zip((o, lse), RESIDUAL_NAMES, strict=True))
    return (o, lse), (q, k, v, runs, orders, alibi, repeats, o, lse)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _to_slots(q, k, v, orders, rows, whole):
    def move(q, k, v, orders):
        return to_slots((q, k, v), (orders[0], orders[1], orders[1]), rows, whole)

    return by_batch_and_head(move, (q, k, v, orders), (*_BY_POSITION, _letters(orders)), _BY_SLOT)


def _extended(runs: Runs, q: Float[Array, "B N T H"], k: Float[Array, "B K S H"]) -> Runs:
    """Returns runs for as many slots as there are rows; those past the last see nothing."""
    of_queries = extend_bounds(runs.k_start, runs.k_stop, q.shape[2])
    of_keys = extend_bounds(runs.q_start, runs.q_stop, k.shape[2])
    return Runs(*of_queries, *of_keys, None if runs.second is None else _extended(runs.second, q, k), runs.blocks)


@functools.partial(jax.jit, static_argnums=(7, 8, 9, 10))
def _attend(q, k, v, runs, orders, alibi, repeats, scores, implementation, config, in_place):
    forward = functools.partial(kernels_of(implementation).forward, **scores._asdict(), config=config)

    def attend(q, k, v, runs, orders, alibi, repeats):
        beside = {"alibi": alibi, "repeats": repeats}
        if orders is None:
            return forward(q, k, v, runs, **beside, **_in_place(in_place))
        order = order_to_write(implementation, config, orders[0])
        o, lse = forward(q, k, v, _extended(runs, q, k), **beside, **_given(order))
        if order is None:
            (o,) = to_positions((o,), orders[:1], row_kernels(implementation, interpret=config.interpret))
        return o, lse[..., : runs.k_start.shape[2]]

    tokens = _runs_letters(runs), _letters(orders), _alibi_letters(alibi), _repeats_letters(repeats)
    by_position = in_place or orders is not None
    results, divisible = ((_BY_POSITION if by_position else _BY_SLOT)[0], "bn-"), not config.interpret
    operands = (q, k, v, runs, orders, alibi, repeats)
    return by_batch_and_head(attend, operands, (*_rows_letters(in_place), *tokens), results, divisible=divisible)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _backward(scores, implementation, config, in_place, residuals, cotangents):
    q, k, v, runs, orders, alibi, repeats, o, lse = residuals
    operands = q, k, v, runs, orders, alibi, repeats, o, lse, *cotangents
    by = _BY_POSITION if in_place or orders is not None else _BY_SLOT
    tokens = _runs_letters(runs), _letters(orders), _alibi_letters(alibi), _repeats_letters(repeats)
    axes = *_rows_letters(in_place), *tokens, by[0], "bn-", by[0], "bn-"
    gradients = functools.partial(_gradients, scores, implementation, config, in_place)
    divisible = not config.interpret
    dq, dk, dv = by_batch_and_head(gradients, operands, axes, by, summed=True, divisible=divisible)
    return dq, dk, dv, None, None, None, None


def _gradients(scores, implementation, config, in_place, q, k, v, runs, orders, alibi, repeats, o, lse, do, dlse):
    rows = row_kernels(implementation, interpret=config.interpret)
    if orders is None:
        delta = sum_of_products(o, do)
        delta = jnp.swapaxes(delta, 1, 2) if in_place else delta
    else:
        do, delta = to_slots_with_delta(do, o, orders[0], rows, whole_slots(implementation))
        past = (0, 0), (0, 0), (0, do.shape[2] - lse.shape[2])
        runs, lse, dlse = _extended(runs, q, k), jnp.pad(lse, past), jnp.pad(dlse, past)
    # d lse / d s is p, as is d o / d s up to the row's mean, so lse's cotangent joins delta.
    delta = delta - dlse
    if runs.blocks is not None or repeats.rows:
        # Queries that see nothing may be shown to keys of a listed block, or of a run that is hidden by earlier rounds:
        # their p must be 0, not exp of infinity.
        lse = jnp.where(jnp.isneginf(lse), -LOWEST, lse)
    kernels, operands = kernels_of(implementation), (q, k, v, runs, lse, do, delta)
    written = (None, None)
    if orders is not None and not config.fused:
        written = tuple(order_to_write(implementation, config, side) for side in orders)
        written = (None, None) if None in written else written
    options = {**scores._asdict(), "config": config, **_in_place(in_place)}
    if config.fused:
        dq, dk, dv = kernels.backward(*operands, **options)
        if in_place:  # all but dq, which is summed by slot
            (dq,) = to_positions((dq,), (identity(q.shape[1]),), rows)
    else:
        options |= {"alibi": alibi, "repeats": repeats}
        dq = kernels.backward_dq(*operands, **options, **_given(written[0]))
        dk, dv = kernels.backward_dkv(*operands, **options, **_given(written[1]))
    if orders is not None and written == (None, None):
        dq, dk, dv = to_positions((dq, dk, dv), (orders[0], orders[1], orders[1]), rows)
    return dq, dk, dv


def _runs_letters(runs: Runs) -> Runs:
    """The axes of runs, as `by_batch_and_head` has them."""
    return jax.tree.map(lambda x: "bn" + "-" * (x.ndim - 2), runs)


def _rows_letters(in_place: bool) -> tuple[str, ...]:
    """The axes of q, k and v as kernels take them."""
    return _BY_POSITION if in_place else _BY_SLOT


def _alibi_letters(alibi: Alibi | None) -> Alibi | None:
    """The axes of slopes and positions, as `by_batch_and_head` has them."""
    return None if alibi is None else Alibi._make(["n", "bn-", "bk-"])


def _repeats_letters(repeats: Repeats) -> Repeats:
    """The axes of ids, as `by_batch_and_head` has them."""
    return Repeats(("bn-",) * len(repeats.rows), ("bk-",) * len(repeats.columns))


def _letters(orders: Any) -> Any:
    """The axes of orders, as `by_batch_and_head` has them."""
    if orders is None:
        return None
    return tuple(
        None if side is None else Permutation._make([axes] * 2)
        for side, axes in zip(orders, ("bn-", "bk-"), strict=True)
    )


def _in_place(in_place: bool) -> dict[str, bool]:
    """An argument of kernels that can read rows in place."""
    return {"in_place": True} if in_place else {}


def _given(order: Array | None) -> dict[str, Array]:
    """An argument that kernels have which write by position."""
    return {} if order is None else {"order": order}


_attention.defvjp(_forward, _backward)
