"""Checks at the boundary, from shapes, dtypes and static options, before any work.

Each error says what was expected, what came, and how to mend it.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Int32

LARGEST_OFFSET = 1 << 30
"""Positions up to here can be added to one another in int32."""

IMPLEMENTATIONS = ("mosaic", "triton", "xla")
"""The fastest first: None picks the first that can do it."""

FLOAT_DTYPES = (jnp.float32, jnp.float16, jnp.bfloat16)


def check_implementation_name(implementation: Any) -> None:
    """Raises ValueError unless the implementation is None or one that there is."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be None or one of {IMPLEMENTATIONS}, got {implementation!r}.")


def check_array(name: str, x: Any, axes: str, dtypes: Sequence[Any]) -> None:
    """Raises TypeError unless x is an array of one of the dtypes, ValueError unless it has these axes, none empty."""
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise TypeError(f"{name} must be an array [{axes}], got {type(x).__name__}; wrap it in jnp.asarray.")
    if not any(x.dtype == jnp.dtype(d) for d in dtypes):
        expected = " or ".join(jnp.dtype(d).name for d in dtypes)
        cast = f"{name}.astype(jnp.{'bool_' if dtypes[0] is jnp.bool_ else jnp.dtype(dtypes[0]).name})"
        raise TypeError(f"{name} must be {expected}, got {x.dtype}; convert it, with {cast} for one.")
    if len(x.shape) != len(axes.split()):
        raise ValueError(f"{name} must have the axes [{axes}], got shape {tuple(x.shape)}.")
    if 0 in x.shape:
        raise ValueError(f"{name} [{axes}] must not be empty, got shape {tuple(x.shape)}.")


def positive_int(name: str, value: Any) -> None:
    """Raises TypeError unless value is a Python int, ValueError unless it is at least 1."""
    at_least(name, value, 1)


def at_least(name: str, value: Any, least: int) -> None:
    """Raises TypeError unless value is a Python int, ValueError unless it is at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be a static Python int, got {type(value).__name__}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")


def check_near(near: int | None, window: int | None, causal: bool) -> None:
    """Raises where near tokens, which are seen whatever their buckets, are not some of those that may be seen."""
    if near is None:
        return
    positive_int("near", near)
    if not causal:
        raise ValueError("near tokens are earlier ones: leave out near, or causal=False.")
    if window is not None and near > window:
        raise ValueError(f"near must be at most the window {window}, got {near}.")


def check_window(window: int | None, *, causal: bool, exclude_self: bool) -> None:
    """Raises where a window is not a positive int, exclude_self comes without causal, or one of both is no bool."""
    for name, value in (("causal", causal), ("exclude_self", exclude_self)):
        if not isinstance(value, bool | np.bool_):
            raise TypeError(f"{name} must be True or False, got {value!r}; name the options that follow it.")
    if window is not None:
        positive_int("window", window)
    if exclude_self and not causal:
        raise ValueError(
            "exclude_self=True needs causal=True: else a query would see two runs of keys, before and after itself."
        )


def check_num_buckets(num_buckets: Any, query_groups: tuple, key_groups: tuple) -> None:
    """Raises where a number of buckets is not a positive int, or there is not one group a side."""
    if num_buckets is None:
        return
    positive_int("num_buckets", num_buckets)
    if len(query_groups) != 1 or len(key_groups) != 1:
        raise ValueError(
            "num_buckets says that the ids of one group a side are below it, "
            f"got {len(query_groups)} query and {len(key_groups)} key groups; leave num_buckets out."
        )


def keep_in_buckets(
    side: str, bucket: Int32[Array, "#B #A L"], keep: Bool[Array, "#B #A L"] | None, num_buckets: int
) -> tuple[Bool[Array, "_B _A L"], Int32[Array, "_B _A"]]:
    """Returns which tokens are kept and in a bucket that there is, and how many are kept and in none."""
    keep = jnp.ones(bucket.shape, bool) if keep is None else keep
    inside = (bucket >= 0) & (bucket < num_buckets)
    outside = jnp.sum(keep & ~inside, axis=-1, dtype=jnp.int32)
    if not isinstance(outside, Tracer) and outside.any():
        ids = np.asarray(jnp.where(keep, bucket, 0))
        raise ValueError(
            f"{side}_group must be in [0, num_buckets={num_buckets}), got ids from {ids.min()} to {ids.max()}."
        )
    return keep & inside, outside


def raise_on_overflow(side: str, overflow: np.ndarray, capacity: int) -> None:
    """Raises ValueError where a head keeps more than its capacity."""
    if not overflow.any():
        return
    batch, head = np.unravel_index(int(np.argmax(overflow)), overflow.shape)
    raise ValueError(
        f"{side}_capacity={capacity} is too small: head {head} of batch entry {batch} keeps "
        f"{capacity + overflow[batch, head]} {'queries' if side == 'query' else 'keys'} "
        f"({np.count_nonzero(overflow)} of {overflow.size} heads keep too many). "
        f"Raise {side}_capacity, or keep fewer tokens; random_keep and top_keep keep exact counts."
    )


def check_offset(query_offset: Any) -> None:
    """Raises TypeError unless the offset is an int or an int32 scalar, ValueError where an int is too large."""
    if isinstance(query_offset, int | np.integer) and not isinstance(query_offset, bool):
        if abs(query_offset) > LARGEST_OFFSET:
            raise ValueError(f"query_offset must be at most 2**30 in size, got {query_offset}.")
        return
    if getattr(query_offset, "dtype", None) != jnp.int32 or getattr(query_offset, "shape", None) != ():
        got = f"{getattr(query_offset, 'dtype', type(query_offset).__name__)}{list(getattr(query_offset, 'shape', ()))}"
        raise TypeError(f"query_offset must be an int or an int32 scalar, got {got}.")


def check_sides(query_groups: tuple, query_keep: Any, key_groups: tuple, key_keep: Any) -> None:
    """Raises where groups and keep masks of queries and keys do not make one pattern."""
    if len(query_groups) != len(key_groups):
        raise ValueError(
            "query_group and key_group must be given together, as many arrays each, "
            f"got {len(query_groups)} and {len(key_groups)}."
        )
    query_shape = _check_side("query", "B T N", query_groups, query_keep)
    key_shape = _check_side("key", "B S K", key_groups, key_keep)
    if 1 != query_shape[0] != key_shape[0] != 1:
        raise ValueError(f"queries and keys must agree in batch size, got {query_shape[0]} and {key_shape[0]}.")
    if query_shape[2] != 1 and query_shape[2] % key_shape[2]:
        raise ValueError(
            "key heads must divide query heads (grouped-query attention), "
            f"got {query_shape[2]} query and {key_shape[2]} key heads."
        )


def _check_side(side: str, axes: str, groups: tuple, keep: Any) -> tuple[int, int, int]:
    """Returns the common shape of one side's groups and keep mask."""
    if not groups and keep is None:
        raise ValueError(
            f"{side}_group or {side}_keep must be given, since the {side} length comes from it; "
            "for one group with nothing dropped use causal()."
        )
    for group in groups:
        check_array(f"{side}_group", group, axes, (jnp.int32,))
    if keep is not None:
        check_array(f"{side}_keep", keep, axes, (jnp.bool_,))
    shapes = [x.shape for x in (*groups, keep) if x is not None]
    lengths, others = {s[1] for s in shapes}, [{s[0] for s in shapes} - {1}, {s[2] for s in shapes} - {1}]
    if len(lengths) > 1 or any(len(sizes) > 1 for sizes in others):
        raise ValueError(
            f"{side}_group and {side}_keep must agree in length, and in batch and heads unless one has size 1, "
            f"got shapes {shapes}."
        )
    return max(s[0] for s in shapes), shapes[0][1], max(s[2] for s in shapes)


def check_tokens(
    lengths: Sequence[int], segment_ids: Any, query_keep: Any, key_keep: Any, **others: Sequence[int]
) -> None:
    """Raises where documents [B T], keep masks [B T N] and [B S K], and others' batch and query heads do not fit."""
    if segment_ids is not None:
        check_array("segment_ids", segment_ids, "B T", (jnp.int32,))
        if not segment_ids.shape[1] == lengths[0] == lengths[1]:
            raise ValueError(f"segment_ids are for T == S, got {segment_ids.shape} for lengths {lengths}.")
    for name, keep, axes, length in (
        ("query_keep", query_keep, "B T N", lengths[0]),
        ("key_keep", key_keep, "B S K", lengths[1]),
    ):
        if keep is None:
            continue
        check_array(name, keep, axes, (jnp.bool_,))
        if keep.shape[1] != length:
            raise ValueError(f"{name} must be of {length} tokens, got shape {keep.shape}.")
    arrays = {"segment_ids": segment_ids, "query_keep": query_keep, "key_keep": key_keep}
    batches = {name: x.shape[0] for name, x in arrays.items() if x is not None}
    batches |= {name: batch for name, (batch, _) in others.items()}
    if len({*batches.values()} - {1}) > 1:
        raise ValueError(f"{', '.join(batches)} must agree in batch size, got {batches}.")
    heads = {name: own for name, (_, own) in others.items()}
    heads |= {} if query_keep is None else {"query_keep": query_keep.shape[2]}
    key_heads = 1 if key_keep is None else key_keep.shape[2]
    found = {*heads.values()} - {1}
    if len(found) > 1 or any(x % key_heads for x in found):
        raise ValueError(
            f"{' and '.join(heads)} must agree in heads, which those of key_keep divide, got {heads} and {key_heads}."
        )


def check_attention_inputs(q: Any, k: Any, v: Any) -> None:
    """Raises unless q is [B T N H], k and v are [B S K H], of one float dtype, and K divides N."""
    for name, x, axes in (("q", q, "B T N H"), ("k", k, "B S K H"), ("v", v, "B S K H")):
        check_array(name, x, axes, FLOAT_DTYPES)
    if k.shape != v.shape:
        raise ValueError(f"k and v must have the same shape [B S K H], got {k.shape} and {v.shape}.")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}; cast them to one.")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q [B T N H] and k [B S K H] must agree in B and H, got {q.shape} and {k.shape}.")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            "key heads must divide query heads (grouped-query attention), "
            f"got {q.shape[2]} query and {k.shape[2]} key heads."
        )


def check_scale(scale: Any) -> None:
    """Raises TypeError unless scale is None or a static number, ValueError unless that is finite."""
    if scale is None:
        return
    if isinstance(scale, bool | Tracer) or not hasattr(scale, "__float__"):
        raise TypeError(
            f"scale must be a static Python float, got {type(scale).__name__}; multiply q by a traced scale instead."
        )
    if not np.isfinite(float(scale)):
        raise ValueError(f"scale must be finite, got {scale}.")


def check_logits(soft_cap: Any, sink_logits: Any, alibi_slopes: Any, q: Any) -> None:
    """Raises unless soft_cap is None or a static positive number, and each of the others None or a float a head."""
    if soft_cap is not None:
        if isinstance(soft_cap, bool | Tracer) or not hasattr(soft_cap, "__float__"):
            raise TypeError(f"soft_cap must be a static Python float, got {type(soft_cap).__name__}.")
        if not 0 < float(soft_cap) < np.inf:
            raise ValueError(f"soft_cap must be positive and finite, got {soft_cap}; leave it out for none.")
    for name, x in (("sink_logits", sink_logits), ("alibi_slopes", alibi_slopes)):
        if x is None:
            continue
        check_array(name, x, "N", FLOAT_DTYPES)
        if x.shape != (q.shape[2],):
            raise ValueError(f"{name} must be [N], one for each of {q.shape[2]} heads, got {x.shape}.")
