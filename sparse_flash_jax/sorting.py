"""The sort under every plan: tokens ordered by (dropped, group, position), and binary searches for runs among them.

A lexicographic sort rather than one on `group * length + position`, so that any int32 group id is right at any length.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32, Shaped

from sparse_flash_jax.manual_axes import vary_alike
from sparse_flash_jax.permute import Permutation
from sparse_flash_jax.plan import repeat_heads


class SortedTokens(NamedTuple):
    """Queries or keys in slot order; kept tokens come first. Arrays are int32; batch and head axes may be 1."""

    order: Int32[Array, "B A C"] | None
    """Position of the token in each slot; None where slots are positions."""
    slot: Int32[Array, "B A L"] | None
    """Slot of the token at each position, C where it has none."""
    groups: tuple[Int32[Array, "B A C"], ...]
    """Group ids of the token in each slot, compared in turn; none where all tokens are in one group."""
    position: Int32[Array, "B A C"]
    """Position of the token in each slot, as `order`, but never None."""
    num_kept: Int32[Array, "B A"]
    """Tokens kept: slots [num_kept, C) hold dropped ones."""
    overflow: Int32[Array, "B A"]
    """Tokens dropped because the capacity was too small."""

    @property
    def permutation(self) -> Permutation | None:
        """Order and slots; None where slots are positions."""
        return None if self.order is None or self.slot is None else Permutation(self.order, self.slot)

    def kept(self) -> Bool[Array, "B A C"]:
        """Returns which slots hold a kept token."""
        slot = jnp.arange(self.position.shape[-1], dtype=jnp.int32)
        return slot[None, None] < self.num_kept[..., None]


def sort_tokens(
    groups: tuple[Int32[Array, "#B #A L"], ...],
    keep: Bool[Array, "#B #A L"] | None,
    length: int,
    capacity: int | None,
    num_buckets: int | None = None,
) -> SortedTokens:
    """Sorts kept tokens by (*groups, position), then dropped ones by position, and cuts the order to the capacity.

    Args:
        groups: int32 [B A L] each; tokens are in one group where all ids are equal. None of them: one group.
        keep: bool [B A L], or None to keep all.
        length: L.
        capacity: static most tokens kept, or None. The latest tokens beyond it are dropped.
        num_buckets: where the ids of kept tokens, of one group, are below it: then one key has group and dropping both.
    """
    capacity = length if capacity is None else min(capacity, length)
    if keep is None and capacity < length:
        keep = jnp.ones((1, 1, length), bool)
    positions = jnp.arange(length, dtype=jnp.int32)[None, None]
    if not groups and keep is None:
        zero = jnp.zeros((1, 1), jnp.int32)
        return SortedTokens(None, None, (), positions, zero + length, zero)

    overflow = num_kept = None
    if keep is not None:
        kept_until = jnp.cumsum(keep, axis=-1, dtype=jnp.int32)
        num_kept = jnp.minimum(kept_until[..., -1], capacity)
        overflow = kept_until[..., -1] - num_kept
        keep = keep & (kept_until <= capacity)
    # Dropped tokens are ordered by position alone.
    keys = groups
    if keep is not None and num_buckets is not None:
        keys = (jnp.where(keep, groups[0], num_buckets),)
    elif keep is not None:
        keys = (~keep, *(jnp.where(keep, x, 0) for x in groups))
    shape = jnp.broadcast_shapes(*(x.shape for x in keys))
    if num_kept is None or overflow is None:
        overflow = jnp.zeros(shape[:2], jnp.int32)
        num_kept = overflow + length
    operands = [jnp.broadcast_to(x, shape) for x in (*keys, positions)]
    *sorted_keys, order = lax.sort(operands, num_keys=len(keys), is_stable=True)
    groups = tuple(x[..., :capacity] for x in sorted_keys[len(keys) - len(groups) :])
    slot = jnp.minimum(invert(order), capacity)
    order = order[..., :capacity]
    num_kept, overflow = (jnp.broadcast_to(x, shape[:2]) for x in (num_kept, overflow))
    return SortedTokens(order, slot, groups, order, num_kept, overflow)


def invert(order: Int32[Array, "B A L"]) -> Int32[Array, "B A L"]:
    """Returns the inverse permutation along the last axis."""
    batch, head, slot = (lax.broadcasted_iota(jnp.int32, order.shape, axis) for axis in range(3))
    return jnp.zeros_like(order).at[batch, head, order].set(slot, unique_indices=True, mode="promise_in_bounds")


def count_below(
    tokens: SortedTokens, groups: tuple[Int32[Array, "#B #A M"], ...], position: Int32[Array, "#B #A M"]
) -> Int32[Array, "#B #A M"]:
    """Returns for each probe how many kept tokens sort before (*groups, position): a binary search, if sorted at all.

    Args:
        tokens: sorted tokens, with the head axis of the probes, or 1.
        groups: int32 [B A M] each, as many as the tokens have.
        position: int32 [B A M]; may lie outside the sequence.
    """
    capacity = tokens.position.shape[-1]
    if tokens.order is None:  # slots are positions
        return jnp.clip(position, 0, capacity)
    bits = capacity.bit_length()
    none_yet = jnp.zeros(jnp.broadcast_shapes(position.shape, (*tokens.num_kept.shape, 1)), jnp.int32)
    tokens, groups, position, none_yet = vary_alike((tokens, groups, position, none_yet))

    def halve(i, found):
        probe = found + (1 << (bits - 1) >> i)
        index = jnp.minimum(probe, capacity) - 1
        below = look_up(tokens.position, index) < position
        for ids, group in zip(reversed(tokens.groups), reversed(groups), strict=True):
            probed = look_up(ids, index)
            below = (probed < group) | ((probed == group) & below)
        return jnp.where(below & (probe <= tokens.num_kept[..., None]), probe, found)

    # Unrolled, the same search takes four times as long to compile, and as long or longer to run, on a CPU.
    return lax.fori_loop(0, bits, halve, none_yet)


def runs_between(
    rows: SortedTokens,
    columns: SortedTokens,
    bounds: tuple[Int32[Array, "#B #A C"], Int32[Array, "#B #A C"]],
    heads: int,
) -> tuple[Int32[Array, "_B N C"], Int32[Array, "_B N C"]]:
    """Slots of the columns that each row sees, where it sees the positions between the bounds of its own group."""
    rows, columns = (jax.tree.map(lambda x: repeat_heads(x, heads), side) for side in (rows, columns))
    lower, upper = (repeat_heads(x, heads) for x in bounds)
    start = count_below(columns, rows.groups, lower)
    stop = jnp.maximum(start, count_below(columns, rows.groups, upper))
    # Dropped rows come last: an empty run behind the kept columns keeps the bounds monotone.
    kept, end = rows.kept(), columns.num_kept[..., None]
    return jnp.where(kept, start, end), jnp.where(kept, stop, end)


def largest_group(tokens: SortedTokens) -> Int32[Array, "B A"]:
    """Returns the number of kept tokens in the largest group."""
    slot = jnp.arange(tokens.position.shape[-1], dtype=jnp.int32)[None, None]
    opens = slot == 0
    for ids in tokens.groups:
        opens = opens | (ids != jnp.roll(ids, 1, axis=-1))
    first = lax.cummax(jnp.where(opens, slot, 0), axis=2)
    return jnp.max(jnp.where(tokens.kept(), slot - first + 1, 0), axis=-1)


def look_up(x: Shaped[Array, "#B #A C"], index: Int32[Array, "#B #A M"]) -> Shaped[Array, "_B _A M"]:
    """Returns what is at each index of a row; batch and head axes of size 1 stand for any size."""
    return jnp.take_along_axis(x, index, axis=-1, mode="clip")
