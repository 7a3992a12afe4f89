"""Attention of a divided sequence with keys that go round a ring: no device ever holds more than two parts of them.

    sort queries and keys of this device, once; both stay in slot order
    for each part that comes by:            where the rule shows none of it, nothing is computed
        runs between my queries and its keys, by binary search
        forward    o and lse of these pairs, merged with those so far by their log-sum-exp
        backward   from the whole rows' lse: dq is summed here, dk and dv travel with the part, and home at the end

k and v travel as one array, and dk and dv as another: XLA has one exchange at a time in flight beside other work.
Sums over parts are in float32, in an order that does not change. Knows positions through layout.py, and kernels as
kernels/interval.py does.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32

from sparse_flash_jax.context.layout import Layout, Part, sees
from sparse_flash_jax.context.planning import runs_of_parts
from sparse_flash_jax.kernels.config import Config
from sparse_flash_jax.kernels.implementations import default_config, kernels_of, whole_slots
from sparse_flash_jax.kernels.interval import RESIDUAL_NAMES, ROWS_NAME
from sparse_flash_jax.kernels.padding import extend_bounds
from sparse_flash_jax.kernels.rows import RowKernels, row_kernels, to_positions, to_slots, to_slots_with_delta
from sparse_flash_jax.kernels.tiles import Runs
from sparse_flash_jax.manual_axes import vary_alike
from sparse_flash_jax.permute import Permutation, gather, identity, restore
from sparse_flash_jax.plan import repeat_heads, visible_pairs
from sparse_flash_jax.rule import Rule
from sparse_flash_jax.sorting import SortedTokens


@dataclasses.dataclass(frozen=True)
class Ring:
    """Who computes what, and how; static."""

    axis: str
    """Mesh axis of the devices."""
    query_layout: Layout
    key_layout: Layout
    rule: Rule
    scale: float
    implementation: str
    config: Config | None

    @property
    def parts(self) -> int:
        """Devices."""
        return self.key_layout.parts

    def shown(self) -> np.ndarray:
        """Whether the part that reaches a device at a step may hold a key that it sees: bool [steps, parts].

        Without the last steps at which no device sees any, as in a window.
        """
        device, step = np.arange(self.parts)[None], np.arange(self.parts)[:, None]
        shown = sees(self.rule, Part(self.query_layout, device), Part(self.key_layout, (device - step) % self.parts))
        return shown[: 1 + np.flatnonzero(shown.any(axis=1)).max(initial=0)]

    def pass_on(self, tree: Any, places: int = 1) -> Any:
        """Returns what the device so many places before this one holds."""
        pairs = [(device, (device + places) % self.parts) for device in range(self.parts)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.axis, pairs), tree) if places % self.parts else tree

    def row_kernels(self) -> RowKernels | None:
        """The kernels that move rows."""
        return row_kernels(self.implementation, interpret=self.config is not None and self.config.interpret)


def ring_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    queries: SortedTokens,
    keys: SortedTokens,
    ring: Ring,
) -> tuple[Float[Array, "B T N H"], Float32[Array, "B T N"], Float32[Array, "B N"]]:
    """Returns o, lse and pairs of this device's queries over the keys of all, in `jax.shard_map`; differentiable.

    Args:
        q: this device's part, by position, as are all arrays here.
        k: this device's part; it is sent on.
        v: this device's part.
        queries: the part's queries, sorted; position is the row in the part.
        keys: the part's keys, sorted likewise.
        ring: the rest.

    Returns:
        o in q's dtype, 0 where a query sees nothing; lse, natural log, -inf there; and how many pairs were visible.
    """
    return _attention(ring, *vary_alike((q, k, v, queries, keys)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(ring, q, k, v, queries, keys):
    return _forward(ring, q, k, v, queries, keys)[0]


@functools.partial(jax.jit, static_argnums=0)
def _forward(ring, q, k, v, queries, keys):
    rows, orders = ring.row_kernels(), _orders(ring, queries, keys)
    moved = to_slots((q, k, v), (orders[0], orders[1], orders[1]), rows, whole_slots(ring.implementation))
    q, k, v = (checkpoint_name(x, ROWS_NAME) for x in moved)

    def visit(step, travelling, sums):
        ids, kv = travelling

        def attend(o, lse, pairs):
            k, v = kv
            runs, config = _meeting(ring, step, queries, _received(keys, ids), q, k)
            more = kernels_of(ring.implementation).forward(q, k, v, runs, scale=ring.scale, config=config)
            return *_merged((o, lse), more), pairs + repeat_heads(visible_pairs(runs), q.shape[1])

        return _where_shown(ring, step, attend, sums)

    nothing = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:3], -jnp.inf, jnp.float32), jnp.zeros(q.shape[:2])
    nothing, _ = vary_alike((nothing, q))
    o, lse, pairs = _go_round(ring, visit, (_ids_to_send(keys), jnp.stack((k, v))), nothing)
    (o,) = to_positions((o.astype(q.dtype),), orders[:1], rows)
    o, lse = (checkpoint_name(x, name) for x, name in zip((o, lse), RESIDUAL_NAMES, strict=True))
    lse_by_position = restore(lse[:, :, : ring.query_layout.rows, None], queries.permutation)[..., 0]
    return (o, lse_by_position, pairs), (q, k, v, queries, keys, o, lse)


@functools.partial(jax.jit, static_argnums=0)
def _backward(ring, residuals, cotangents):
    (q, k, v, queries, keys, o, lse), (do, dlse, _) = vary_alike((residuals, cotangents))
    rows, orders = ring.row_kernels(), _orders(ring, queries, keys)
    do, delta = to_slots_with_delta(do, o, orders[0], rows, whole_slots(ring.implementation))
    dlse = gather(dlse[..., None], queries.permutation)[..., 0]
    # d lse / d s is p, as is d o / d s up to the row's mean, so lse's cotangent joins delta.
    delta = delta - jnp.pad(dlse, ((0, 0), (0, 0), (0, delta.shape[2] - dlse.shape[2])))

    def visit(step, travelling, sums):
        (ids, kv), (dq, of_part) = travelling, sums
        # Sent on one step late, while this step computes; at the first step they are still zero.
        of_part = of_part if isinstance(step, int) and step == 0 else ring.pass_on(of_part)

        def add(dq, of_part):
            k, v = kv
            runs, config = _meeting(ring, step, queries, _received(keys, ids), q, k)
            more_dq, *more = _gradients(ring, config, q, k, v, runs, lse, do, delta)
            return dq + more_dq.astype(jnp.float32), of_part + jnp.stack(more).astype(jnp.float32)

        return _where_shown(ring, step, add, (dq, of_part))

    kv = jnp.stack((k, v))
    zeros, _ = vary_alike((tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, kv)), q))
    dq, of_part = _go_round(ring, visit, (_ids_to_send(keys), kv), zeros)
    dk, dv = ring.pass_on(of_part, 1 - len(ring.shown()))
    gradients = (x.astype(q.dtype) for x in (dq, dk, dv))
    return *to_positions(tuple(gradients), (orders[0], orders[1], orders[1]), rows), None, None


_attention.defvjp(_forward, _backward)


def _go_round(ring: Ring, visit: Callable[[Any, Any, Any], Any], travelling: Any, sums: Any) -> Any:
    """Returns the sums after `visit(step, travelling, sums)` of each part that comes by, the device's own first."""

    def step(number, state):
        travelling, sums = state
        # The next part is on its way while this one is attended to.
        return ring.pass_on(travelling), visit(number, travelling, sums)

    last = len(ring.shown()) - 1
    if last > 0:
        travelling, sums = lax.fori_loop(0, last, step, (travelling, sums))
    return visit(last, travelling, sums)


def _where_shown(ring: Ring, step: Any, compute: Callable[..., Any], sums: Any) -> Any:
    """Returns `compute(*sums)` where the rule shows this device some of the part that is there, else the sums."""
    shown = ring.shown()
    if shown.all():
        return compute(*sums)
    here = jnp.asarray(shown)[step, lax.axis_index(ring.axis)]
    return lax.cond(here, compute, lambda *sums: tuple(sums), *sums)


def _meeting(ring: Ring, step: Any, queries: SortedTokens, keys: SortedTokens, q: Array, k: Array) -> Any:
    """Returns runs between the device's queries and the part that is there at a step, and the tiles to use."""
    device = lax.axis_index(ring.axis)
    source = jnp.remainder(device - step, ring.parts)
    runs = runs_of_parts(queries, keys, Part(ring.query_layout, device), Part(ring.key_layout, source), ring.rule)
    config = ring.config or default_config(
        ring.implementation, dtype=q.dtype, head_dim=q.shape[-1], runs=runs, long_runs=not keys.groups
    )
    of_queries = extend_bounds(runs.k_start, runs.k_stop, q.shape[2])
    return vary_alike((Runs(*of_queries, *extend_bounds(runs.q_start, runs.q_stop, k.shape[2])), q))[0], config


def _merged(so_far: tuple[Array, Array], more: tuple[Array, Array]) -> tuple[Array, Array]:
    """Returns o and lse, float32, of the pairs of both; a row may have none in one, or in either."""
    (o, lse), (other_o, other_lse) = so_far, more
    top = jnp.maximum(lse, other_lse)
    top = jnp.where(top > -jnp.inf, top, 0.0)
    weight, other_weight = jnp.exp(lse - top), jnp.exp(other_lse - top)
    total = weight + other_weight
    some = total > 0
    total = jnp.where(some, total, 1.0)
    o = (weight / total)[..., None] * o + (other_weight / total)[..., None] * other_o.astype(jnp.float32)
    return o, jnp.where(some, top + jnp.log(total), -jnp.inf)


def _gradients(ring: Ring, config: Config, *operands: Any) -> tuple[Array, Array, Array]:
    kernels = kernels_of(ring.implementation)
    if config.fused:
        return kernels.backward(*operands, scale=ring.scale, config=config)
    dq = kernels.backward_dq(*operands, scale=ring.scale, config=config)
    return dq, *kernels.backward_dkv(*operands, scale=ring.scale, config=config)


def _orders(ring: Ring, queries: SortedTokens, keys: SortedTokens) -> tuple[Permutation | None, Permutation | None]:
    """The slots of both sides, written out where kernels move rows."""
    if ring.row_kernels() is None:
        return queries.permutation, keys.permutation
    of_queries, of_keys = queries.permutation, keys.permutation
    return of_queries or identity(ring.query_layout.rows), of_keys or identity(ring.key_layout.rows)


def _ids_to_send(keys: SortedTokens) -> Any:
    """What other devices have to know of this part's tokens: nothing where all of them are visible, by position."""
    return None if keys.order is None else (keys.groups, keys.position, keys.num_kept)


def _received(own: SortedTokens, ids: Any) -> SortedTokens:
    """The tokens of another part, as its device sent them."""
    if ids is None:
        return own
    groups, position, num_kept = ids
    return own._replace(order=position, slot=None, groups=groups, position=position, num_kept=num_kept)
