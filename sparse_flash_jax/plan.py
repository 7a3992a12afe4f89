"""What is visible, as a plan: two orders of tokens, and between them one run of keys for each query.

How a plan is made is told in planning.py; permute.py moves rows by its orders, and the kernels compute over its runs.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float32, Int32

from sparse_flash_jax.kernels.tiles import Runs, listed
from sparse_flash_jax.kernels.walks import keys_of_queries
from sparse_flash_jax.permute import Permutation
from sparse_flash_jax.stats import PlanStats, plan_stats
from sparse_flash_jax.validation import positive_int


class AttentionPlan(NamedTuple):
    """Which pairs of queries and keys are visible: two orders and the runs between them.

    "Position" is a token's place in the sequence, "slot" its place in the sorted order. All arrays are int32 and carry
    no gradient. Batch and head axes of size 1 stand for any size. Orders and slots are None where slots are positions.
    """

    query_order: Int32[Array, "B N Tc"] | None
    """Position of the query in each slot; Tc is the query capacity, at most T."""
    query_slot: Int32[Array, "B N T"] | None
    """Slot of the query at each position, Tc where it has none."""
    key_order: Int32[Array, "B K Sc"] | None
    """Position of the key in each slot; Sc is the key capacity, at most S."""
    key_slot: Int32[Array, "B K S"] | None
    """Slot of the key at each position, Sc where it has none."""
    runs: Runs
    """Key slots that each query slot sees, and query slots that see each key slot."""
    query_overflow: Int32[Array, "B N"]
    """Queries that were to be kept and did not fit into the capacity."""
    key_overflow: Int32[Array, "B K"]
    """Keys that were to be kept and did not fit into the capacity."""
    kept_keys: Int32[Array, "B K"]
    """Keys that are kept."""
    largest_group: Int32[Array, "B K"] | None
    """Kept keys in the largest group; None where all tokens are in one."""
    query_offset: Int32[Array, "B N"] | None = None
    """Position of the first query among the keys, None for 0; a union or an intersection has that of its first plan."""

    @property
    def queries(self) -> Permutation | None:
        """Order and slots of the queries."""
        return _permutation(self.query_order, self.query_slot)

    @property
    def keys(self) -> Permutation | None:
        """Order and slots of the keys."""
        return _permutation(self.key_order, self.key_slot)

    @property
    def query_length(self) -> int:
        """T, the number of queries before any is dropped."""
        return (self.runs.k_start if self.query_slot is None else self.query_slot).shape[-1]

    @property
    def key_length(self) -> int:
        """S, the number of keys before any is dropped."""
        return (self.runs.q_start if self.key_slot is None else self.key_slot).shape[-1]

    @property
    def batch_size(self) -> int:
        """B, or 1 where all batch entries are alike."""
        return max(self.query_overflow.shape[0], self.key_overflow.shape[0])

    @property
    def query_heads(self) -> int:
        """Heads of the query side: N, or 1 where all heads are alike."""
        return self.query_overflow.shape[1]

    @property
    def key_heads(self) -> int:
        """Heads of the key side: K, or 1 where all heads are alike."""
        return self.key_overflow.shape[1]

    @property
    def long_runs(self) -> bool:
        """Whether runs are as long as the rule allows, as nothing divides tokens into groups."""
        return self.largest_group is None

    @property
    def overflow(self) -> Int32[Array, "B N"]:
        """Tokens, queries and keys together, that were to be kept and did not fit, for each batch entry and head."""
        heads = max(self.query_heads, self.key_heads)
        return repeat_heads(self.query_overflow, heads) + repeat_heads(self.key_overflow, heads)

    def mask(self) -> Bool[Array, "B N T S"]:
        """Returns the dense meaning of the plan, in original order; T x S, so for tests and pictures.

        Returns:
            bool [B N T S], True where a query sees a key. Axes on which the plan does not depend have size 1.
        """
        mask = mask_of_runs(self.runs)
        query_slots, key_slots = mask.shape[2:]
        if self.key_slot is not None:
            index = repeat_heads(self.key_slot, mask.shape[1])[:, :, None]
            mask = jnp.take_along_axis(mask, index, axis=3, mode="clip") & (index < key_slots)
        if self.query_slot is not None:
            index = repeat_heads(self.query_slot, mask.shape[1])[..., None]
            mask = jnp.take_along_axis(mask, index, axis=2, mode="clip") & (index < query_slots)
        return mask

    def density(self) -> Float32[Array, ""]:
        """Returns visible pairs over the pairs of dense causal attention, averaged over batch and heads; jit-able.

        The denominator is that of `causal(T, S)`, so a bidirectional plan has a density of nearly 2, and one query with
        a long cache behind it (`query_offset`) a density of S.
        """
        return share_of_causal(visible_pairs(self.runs), self.query_length, self.key_length)

    def stats(self, block_q: int = 128, block_k: int = 128) -> PlanStats:
        """Returns counts of visible pairs, tiles, lonely queries and the largest group, and the time to expect.

        Args:
            block_q: queries in a tile; of listed blocks, the largest common divisor with theirs.
            block_k: keys in a tile.

        Returns:
            A `PlanStats`, which prints as a table.

        Raises:
            ValueError: if called under `jit` (use `density()` there), or if a block is not positive.
        """
        if isinstance(self.runs.k_start, Tracer):
            raise ValueError("plan.stats() reads the plan's values, which are not known under jit; use plan.density().")
        positive_int("block_q", block_q)
        positive_int("block_k", block_k)
        return plan_stats(
            self.runs,
            causal_pairs=causal_pairs(self.query_length, self.key_length),
            query_length=self.query_length,
            key_length=self.key_length,
            largest_group=int(np.max(self.kept_keys if self.largest_group is None else self.largest_group)),
            method="qk" if self.largest_group is None else "hash",
            permuted=self.queries is not None,
            block_q=block_q,
            block_k=block_k,
        )


def _permutation(order: Array | None, slot: Array | None) -> Permutation | None:
    return None if order is None or slot is None else Permutation(order, slot)


def repeat_heads(x: Array, heads: int) -> Array:
    """Returns x [B A ...] with each head repeated so that there are `heads`; an axis of size 1 stays."""
    return x if x.shape[1] in (1, heads) else jnp.repeat(x, heads // x.shape[1], axis=1)


def mask_of_runs(runs: Runs) -> Bool[Array, "B N Tc Sc"]:
    """Returns which key slots each query slot sees."""
    slot = jnp.arange(runs.q_start.shape[-1], dtype=jnp.int32)
    mask = (runs.k_start[..., None] <= slot[None, None, None]) & (slot[None, None, None] < runs.k_stop[..., None])
    if runs.second is not None:
        mask = mask | mask_of_runs(runs.second)
    if runs.blocks is None:
        return mask
    lists, query = runs.blocks, jnp.arange(mask.shape[2], dtype=jnp.int32)
    counts = listed(lists.key_index, lists.key_count)
    block = jnp.arange(lists.query_index.shape[2], dtype=jnp.int32)[None, None, None, None]
    blocks = jnp.any((lists.key_index[..., None] == block) & counts[..., None], axis=3)
    mask = mask & blocks[:, :, query // lists.sizes.queries][..., slot // lists.sizes.keys]
    if lists.kept_keys is None:
        return mask
    kept = lists.kept_keys[:, :, slot // lists.sizes.keys]
    return mask & ((slot % lists.sizes.keys)[None, None] < kept)[:, :, None]


def visible_pairs(runs: Runs) -> Float32[Array, "B N"]:
    """Returns how many pairs the runs show; axes of size 1 stand for any size."""
    return jnp.sum(keys_of_queries(runs).astype(jnp.float32), axis=-1)


def share_of_causal(pairs: Float32[Array, "B N"], query_length: int, key_length: int) -> Float32[Array, ""]:
    """Returns so many pairs over those of dense causal attention, averaged over batch and heads."""
    return jnp.mean(pairs) / np.float32(causal_pairs(query_length, key_length))


def causal_pairs(query_length: int, key_length: int) -> int:
    """Returns how many pairs dense causal attention sees: the sum of min(i + 1, S) over T queries."""
    short = min(query_length, key_length)
    return short * (short + 1) // 2 + (query_length - short) * key_length
