"""Plans of listed blocks and of two runs, with what they show by definition: cases of tests, in numpy."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

import sparse_flash_jax as sfj
from tests.cases import Inputs

BATCH, LENGTH, HEADS, KEY_HEADS, HEAD_DIM = 2, 150, 2, 1, 16
_RNG = np.random.default_rng(0)
SEGMENTS = np.cumsum(_RNG.random((BATCH, LENGTH)) < 0.03, axis=1).astype(np.int32)
QUERY_KEEP = _RNG.random((BATCH, LENGTH, HEADS)) < 0.6
KEY_KEEP = _RNG.random((BATCH, LENGTH, KEY_HEADS)) < 0.6
QUERY, KEY = np.arange(LENGTH)[:, None], np.arange(LENGTH)[None]
TOKENS = {"segment_ids": SEGMENTS, "query_keep": QUERY_KEEP, "key_keep": KEY_KEEP}


class Beyond(NamedTuple):
    """A plan, and its visible pairs by definition: bool [B N T T]."""

    plan: Callable[[], sfj.AttentionPlan]
    visible: np.ndarray


def inputs(dtype: str) -> Inputs:
    rng = np.random.default_rng(1)
    queries, keys = (BATCH, LENGTH, HEADS), (BATCH, LENGTH, KEY_HEADS)
    q, k, v, do = (jnp.asarray(rng.standard_normal((*s, HEAD_DIM)), dtype) for s in (queries, keys, keys, queries))
    return Inputs(q, k, v, do, jnp.asarray(rng.standard_normal(queries), jnp.float32))


def _of_tokens(names: tuple[str, ...]) -> np.ndarray:
    """Pairs of kept tokens of one document."""
    visible = np.ones((BATCH, HEADS, LENGTH, LENGTH), bool)
    if "segment_ids" in names:
        visible &= (SEGMENTS[:, :, None] == SEGMENTS[:, None, :])[:, None]
    if "query_keep" in names:
        visible &= QUERY_KEEP.swapaxes(1, 2)[..., None]
    if "key_keep" in names:
        visible &= np.repeat(KEY_KEEP.swapaxes(1, 2), HEADS // KEY_HEADS, axis=1)[:, :, None]
    return visible


def _first_of_document(documents: bool) -> np.ndarray:
    """[B T]: where each token's document begins."""
    if not documents:
        return np.zeros((BATCH, LENGTH), int)
    return np.array([[np.flatnonzero(row == x)[0] for x in row] for row in SEGMENTS])


def _given(names: tuple[str, ...]) -> dict[str, Any]:
    return {name: jnp.asarray(TOKENS[name]) for name in names}


def _blocks(rows, columns, share, names=(), causal=True, window=None, axes=(BATCH, HEADS), **options) -> Beyond:
    sizes = -(-LENGTH // rows), -(-LENGTH // columns)
    mask = np.random.default_rng(2).random((*axes, *sizes)) < share
    visible = np.repeat(np.repeat(mask, rows, 2), columns, 3)[:, :, :LENGTH, :LENGTH] & _of_tokens(names)
    visible = visible & (QUERY >= KEY if causal else True) & (window > QUERY - KEY if window else True)
    lengths = {"query_length": LENGTH, "key_length": LENGTH}
    make = functools.partial(sfj.block_sparse, block_size=(rows, columns), causal=causal, window=window, **lengths)
    return Beyond(lambda: make(jnp.asarray(mask), **_given(names), **options), visible)


def _sinks(sinks, window, names=()) -> Beyond:
    place = KEY - _first_of_document("segment_ids" in names)[..., None]  # [B T T], of a key in its document
    visible = _of_tokens(names) & (QUERY >= KEY) & ((window > QUERY - KEY) | (place < sinks)[:, None])
    return Beyond(lambda: sfj.sinks_and_window(LENGTH, sinks, window, **_given(names)), visible)


def _prefix(names=()) -> Beyond:
    place = np.arange(LENGTH) - _first_of_document("segment_ids" in names)
    prefix = place < np.array([[7], [90]])
    visible = _of_tokens(names) & ((QUERY >= KEY) | prefix[:, None, None])
    return Beyond(lambda: sfj.prefix_lm(jnp.asarray(prefix), **_given(names)), visible)


def _chunked(names=()) -> Beyond:
    visible = _of_tokens(names) & (QUERY >= KEY) & (QUERY // 37 == KEY // 37)
    return Beyond(lambda: sfj.chunked(LENGTH, 37, **_given(names)), visible)


def _dilated(names=()) -> Beyond:
    visible = _of_tokens(names) & (QUERY >= KEY) & ((QUERY - KEY) % 3 == 0) & (QUERY - KEY < 20)
    return Beyond(lambda: sfj.dilated(LENGTH, 3, window=20, **_given(names)), visible)


def _everywhere(visible) -> np.ndarray:
    return np.broadcast_to(visible, (BATCH, HEADS, LENGTH, LENGTH))


def _pair(combine, visible, shift) -> Beyond:
    """Of a window, and of what is causal so many positions later."""
    return Beyond(
        lambda: combine(sfj.causal(LENGTH, window=30), sfj.causal(LENGTH, query_offset=-shift)), _everywhere(visible)
    )


def _intersected_blocks() -> Beyond:
    blocks = _blocks(32, 16, 0.4)
    return Beyond(
        lambda: sfj.intersect(blocks.plan(), sfj.causal(LENGTH, query_offset=-40)), blocks.visible & (QUERY - 40 >= KEY)
    )


ALL_TOKENS = tuple(TOKENS)
WINDOW30 = (QUERY >= KEY) & (QUERY - KEY < 30)
CASES = {
    "blocks64": _blocks(64, 64, 0.5),
    "blocks64_all": _blocks(64, 64, 0.6, ALL_TOKENS, window=70),
    "blocks": _blocks(32, 16, 0.3),
    "blocks_none": _blocks(32, 16, 0.0),
    "blocks_full": _blocks(32, 16, 1.0),
    "blocks_both_ways": _blocks(16, 32, 0.3, causal=False),
    "blocks_alike": _blocks(32, 16, 0.3, axes=(1, 1)),
    "blocks_documents": _blocks(32, 16, 0.6, ("segment_ids",)),
    "blocks_kept": _blocks(32, 16, 0.6, ("query_keep", "key_keep")),
    "blocks_all": _blocks(32, 16, 0.6, ALL_TOKENS, window=50),
    "blocks_of_odd_sizes": _blocks(25, 7, 0.3, ("key_keep",), axes=(1, 1)),
    "sinks": _sinks(4, 30),
    "sinks_alone": _sinks(100, 1),
    "sinks_in_window": _sinks(3, 200),
    "sinks_documents": _sinks(4, 12, ("segment_ids",)),
    "sinks_kept": _sinks(20, 30, ("query_keep", "key_keep")),
    "sinks_all": _sinks(4, 12, ALL_TOKENS),
    "prefix": _prefix(),
    "prefix_all": _prefix(ALL_TOKENS),
    "chunked_all": _chunked(ALL_TOKENS),
    "dilated_all": _dilated(ALL_TOKENS),
    "union_apart": _pair(sfj.union, WINDOW30 | (QUERY - 60 >= KEY), 60),
    "union_joined": _pair(sfj.union, WINDOW30 | (QUERY - 10 >= KEY), 10),
    "intersection": _pair(sfj.intersect, WINDOW30 & (QUERY - 10 >= KEY), 10),
    "intersection_empty": _pair(sfj.intersect, WINDOW30 & (QUERY - 60 >= KEY), 60),
    "intersected_blocks": _intersected_blocks(),
}
