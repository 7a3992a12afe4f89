"""What attention over visible pairs is, in numpy float64 and loops, from the definitions alone.

The judge of plans and of `reference_attention`, and so independent of the package: arXiv 2306.01160, section 3.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

Groups = np.ndarray | tuple[np.ndarray, ...] | None


def _rows(x: Groups, batch: int, heads: int, length: int, default: int) -> list:
    """[B|1 L A|1] -> nested lists [B][heads][L], each head repeated; a tuple gives tuples of ids."""
    if x is None:
        return [[[default] * length] * heads] * batch
    if isinstance(x, tuple):
        parts = [_rows(part, batch, heads, length, default) for part in x]
        return [
            [list(zip(*rows, strict=True)) for rows in zip(*entry, strict=True)] for entry in zip(*parts, strict=True)
        ]
    x = np.broadcast_to(x, (batch, *x.shape[1:]))
    return np.repeat(x, heads // x.shape[2], axis=2).swapaxes(1, 2).tolist()


def _first_kept(keep: Sequence[bool], capacity: int | None) -> list[bool]:
    """The keep mask without the latest tokens that do not fit into the capacity."""
    fits, left = [], len(keep) if capacity is None else capacity
    for token in keep:
        fits.append(bool(token) and left > 0)
        left -= fits[-1]
    return fits


def visible(
    *,
    batch: int,
    query_length: int,
    key_length: int,
    query_heads: int,
    query_group: Groups = None,
    key_group: Groups = None,
    query_keep: np.ndarray | None = None,
    key_keep: np.ndarray | None = None,
    causal: bool = True,
    exclude_self: bool = False,
    window: int | None = None,
    query_offset: int = 0,
    query_capacity: int | None = None,
    key_capacity: int | None = None,
) -> np.ndarray:
    """bool [B N T S]: both kept, in one group, and at positions that see each other."""
    query_axes, key_axes = (batch, query_heads, query_length), (batch, query_heads, key_length)
    query_ids, key_ids = _rows(query_group, *query_axes, 0), _rows(key_group, *key_axes, 0)
    query_kept, key_kept = _rows(query_keep, *query_axes, True), _rows(key_keep, *key_axes, True)
    seen = np.zeros((*query_axes, key_length), bool)
    for b in range(batch):
        for n in range(query_heads):
            q_ids, k_ids = query_ids[b][n], key_ids[b][n]
            q_kept, k_kept = _first_kept(query_kept[b][n], query_capacity), _first_kept(key_kept[b][n], key_capacity)
            for i in range(query_length):
                for j in range(key_length):
                    back = i + query_offset - j
                    in_order = not causal or (back > 0 if exclude_self else back >= 0)
                    in_window = window is None or back < window
                    both = q_kept[i] and k_kept[j] and q_ids[i] == k_ids[j]
                    seen[b, n, i, j] = both and in_order and in_window
    return seen


class Attention(NamedTuple):
    """Outputs and gradients, float64, in the layouts of the package."""

    o: np.ndarray
    lse: np.ndarray
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray


def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    seen: np.ndarray,
    do: ArrayLike,
    dlse: ArrayLike,
    scale: float | None = None,
) -> Attention:
    """Softmax attention of each query over the keys that it sees, and the gradients of <o, do> + <lse, dlse>."""
    q, k, v, do, dlse = (np.asarray(x, np.float64) for x in (q, k, v, do, dlse))
    batch, length, heads, head_dim = q.shape
    group = heads // k.shape[2]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    o, lse = np.zeros_like(q), np.full((batch, length, heads), -np.inf)
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b in range(batch):
        for n in range(heads):
            for i in range(length):
                keys = np.flatnonzero(np.broadcast_to(seen, (batch, heads, length, k.shape[1]))[b, n, i])
                if keys.size == 0:
                    continue
                kj, vj = k[b, keys, n // group], v[b, keys, n // group]
                s = scale * (kj @ q[b, i, n])
                lse[b, i, n] = s.max() + math.log(np.exp(s - s.max()).sum())
                p = np.exp(s - lse[b, i, n])
                o[b, i, n] = p @ vj
                ds = p * (vj @ do[b, i, n] - o[b, i, n] @ do[b, i, n] + dlse[b, i, n])
                dq[b, i, n] = scale * ds @ kj
                dk[b, keys, n // group] += scale * ds[:, None] * q[b, i, n]
                dv[b, keys, n // group] += p[:, None] * do[b, i, n]
    return Attention(o, lse, dq, dk, dv)
