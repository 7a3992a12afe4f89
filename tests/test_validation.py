"""The error table: each wrong call, the error that it raises, and what the message says was expected and came."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparse_flash_jax

pytestmark = pytest.mark.usefixtures("without_shape_checks")

sfj: Any = sparse_flash_jax  # wrong calls are the point here
Q, K, V = jnp.zeros((2, 6, 4, 8)), jnp.zeros((2, 5, 2, 8)), jnp.zeros((2, 5, 2, 8))
PLAN = sfj.causal(6, 5)
GROUP, KEY_GROUP = jnp.zeros((2, 6, 4), jnp.int32), jnp.zeros((2, 5, 2), jnp.int32)
KEEP, KEY_KEEP = jnp.ones((2, 6, 4), bool), jnp.ones((2, 5, 2), bool)
KEY = jax.random.key(0)


def attend(q: Any = Q, k: Any = K, v: Any = V, plan: Any = PLAN, **options: Any):
    return sfj.sparse_attention(q, k, v, plan, **options)


def grouped(query_group: Any = GROUP, key_group: Any = KEY_GROUP, **options: Any):
    return sfj.make_plan(query_group=query_group, key_group=key_group, **options)


def kept(query_keep: Any = KEEP, key_keep: Any = KEY_KEEP, **options: Any):
    return sfj.make_plan(query_keep=query_keep, key_keep=key_keep, **options)


# name: (call, error, what was expected, what came)
ATTENTION = {
    "q of rank 3": (lambda: attend(q=Q[0]), ValueError, r"q .*\[B T N H\]", r"got shape \(6, 4, 8\)"),
    "v of rank 5": (lambda: attend(v=V[None]), ValueError, r"v .*\[B S K H\]", r"got shape \(1, 2, 5, 2, 8\)"),
    "empty q": (lambda: attend(q=Q[:, :0]), ValueError, r"q .*not be empty", r"got shape \(2, 0, 4, 8\)"),
    "a list": (lambda: attend(q=[1.0]), TypeError, r"q must be an array \[B T N H\]", "got list"),
    "integers": (lambda: attend(q=Q.astype(jnp.int32)), TypeError, "q must be float32", "got int32"),
    "float64": (lambda: attend(k=np.zeros(K.shape)), TypeError, "k must be float32", "got float64"),
    "mixed dtypes": (
        lambda: attend(v=V.astype(jnp.bfloat16)),
        TypeError,
        "q, k and v must have one dtype",
        "got float32, float32 and bfloat16",
    ),
    "k unlike v": (lambda: attend(v=V[:, :4]), ValueError, "k and v must have the same shape", "got .* and .*4"),
    "batch": (lambda: attend(q=Q[:1]), ValueError, "must agree in B and H", r"got \(1, 6, 4, 8\) and \(2, 5, 2, 8\)"),
    "head dim": (lambda: attend(q=Q[..., :4]), ValueError, "must agree in B and H", r"got \(2, 6, 4, 4\)"),
    "heads that do not divide": (
        lambda: attend(q=Q[:, :, :3]),
        ValueError,
        "key heads must divide query heads",
        "got 3 query and 2 key heads",
    ),
    "no plan": (lambda: attend(plan=None), TypeError, "plan must be an AttentionPlan", "got NoneType"),
    "a mask for a plan": (lambda: attend(plan=PLAN.mask()), TypeError, "plan must be an AttentionPlan", "got Array"),
    "plan of another query length": (lambda: attend(plan=sfj.causal(7, 5)), ValueError, "for 7 queries", "got 6"),
    "plan of another key length": (lambda: attend(plan=sfj.causal(6)), ValueError, "for 6 keys", "got 5"),
    "plan of other query heads": (
        lambda: attend(plan=grouped(GROUP[..., :2])),
        ValueError,
        "for 2 query heads",
        "got 4",
    ),
    "plan of other key heads": (
        lambda: attend(plan=grouped(key_group=jnp.zeros((2, 5, 4), jnp.int32))),
        ValueError,
        "for 4 key heads",
        "got 2",
    ),
    "plan of another batch": (
        lambda: attend(plan=grouped(jnp.zeros((3, 6, 4), jnp.int32), jnp.zeros((3, 5, 2), jnp.int32))),
        ValueError,
        "for 3 batch entries",
        "got 2",
    ),
    "traced scale": (lambda: jax.jit(lambda s: attend(scale=s))(0.5), TypeError, "scale must be a static", "got .*T"),
    "scale of True": (lambda: attend(scale=True), TypeError, "scale must be a static", "got bool"),
    "scale of nan": (lambda: attend(scale=float("nan")), ValueError, "scale must be finite", "got nan"),
    "scale in words": (lambda: attend(scale="1"), TypeError, "scale must be a static", "got str"),
    "unknown implementation": (
        lambda: attend(implementation="cudnn"),
        ValueError,
        "None or one of .*mosaic.*triton.*xla",
        "got 'cudnn'",
    ),
    "mask of another shape": (
        lambda: sfj.reference_attention(Q, K, V, jnp.ones((2, 4, 6, 6), bool)),
        ValueError,
        "mask must be",
        r"got shape \(2, 4, 6, 6\)",
    ),
    "mask of numbers": (
        lambda: sfj.reference_attention(Q, K, V, jnp.ones((2, 4, 6, 5))),
        TypeError,
        "mask must be bool",
        "got float32",
    ),
}

PLANS = {
    "group of floats": (lambda: grouped(GROUP.astype(jnp.float32)), TypeError, "query_group must be int32", "float32"),
    "group of int64": (
        lambda: grouped(key_group=np.zeros((2, 5, 2), np.int64)),
        TypeError,
        "key_group must be int32",
        "got int64",
    ),
    "group of booleans": (lambda: grouped(KEEP), TypeError, "query_group must be int32", "got bool"),
    "keep of integers": (lambda: kept(KEEP.astype(jnp.int32)), TypeError, "query_keep must be bool", "got int32"),
    "keep of floats": (
        lambda: kept(key_keep=KEY_KEEP.astype(jnp.float32)),
        TypeError,
        "key_keep must be bool",
        "got float32",
    ),
    "group of rank 2": (lambda: grouped(GROUP[0]), ValueError, r"query_group .*\[B T N\]", r"got shape \(6, 4\)"),
    "keep of rank 4": (lambda: kept(key_keep=KEY_KEEP[None]), ValueError, r"key_keep .*\[B S K\]", r"got shape \(1,"),
    "one group alone": (
        lambda: grouped(key_group=None, key_keep=KEY_KEEP),
        ValueError,
        "query_group and key_group must be given together",
        "got 1 and 0",
    ),
    "more groups on one side": (
        lambda: grouped((GROUP, GROUP)),
        ValueError,
        "query_group and key_group must be given together",
        "got 2 and 1",
    ),
    "group unlike keep": (
        lambda: grouped(query_keep=KEEP[:, :5]),
        ValueError,
        "query_group and query_keep must agree in length",
        r"got .*\(2, 5, 4\)",
    ),
    "group and keep of other heads": (
        lambda: grouped(query_keep=KEEP[..., :2]),
        ValueError,
        "must agree .* in batch and heads unless one has size 1",
        r"got .*\(2, 6, 2\)",
    ),
    "batches of two sizes": (
        lambda: grouped(jnp.zeros((3, 6, 4), jnp.int32)),
        ValueError,
        "must agree in batch size",
        "got 3 and 2",
    ),
    "group heads that do not divide": (
        lambda: grouped(GROUP[..., :3]),
        ValueError,
        "key heads must divide query heads",
        "got 3 query and 2 key heads",
    ),
    "no buckets": (lambda: grouped(GROUP, num_buckets=0), ValueError, "num_buckets must be at least 1", "got 0"),
    "buckets in part": (
        lambda: grouped(GROUP, num_buckets=2.5),
        TypeError,
        "num_buckets must be a static",
        "got float",
    ),
    "buckets of two groups": (
        lambda: grouped((GROUP, GROUP), key_group=(GROUP, GROUP), num_buckets=4),
        ValueError,
        "the ids of one group a side",
        "got 2 query and 2 key groups",
    ),
    "negative capacity": (lambda: kept(query_capacity=-1), ValueError, "query_capacity must be at least 1", "got -1"),
    "no capacity": (lambda: kept(key_capacity=0), ValueError, "key_capacity must be at least 1", "got 0"),
    "fractional capacity": (lambda: kept(key_capacity=2.5), TypeError, "key_capacity must be a static", "got float"),
    "small capacity": (lambda: kept(query_capacity=4), ValueError, "query_capacity=4 is too small", "keeps 6 queries"),
    "window of none": (lambda: kept(window=0), ValueError, "window must be at least 1", "got 0"),
    "window of True": (lambda: kept(window=True), TypeError, "window must be a static Python int", "got bool"),
    "fractional offset": (lambda: kept(query_offset=1.5), TypeError, "query_offset must be an int", "got float"),
    "far offset": (
        lambda: kept(query_offset=2**31),
        ValueError,
        r"query_offset must be at most 2\*\*30",
        "got 2147483648",
    ),
    "offset for each": (
        lambda: kept(query_offset=jnp.zeros(2, jnp.int32)),
        TypeError,
        "query_offset must be an int or an int32 scalar",
        r"got int32\[2\]",
    ),
    "length of none": (lambda: sfj.causal(0), ValueError, "query_length must be at least 1", "got 0"),
    "fractional length": (lambda: sfj.causal(4, 2.0), TypeError, "key_length must be a static", "got float"),
    "ids with heads": (lambda: sfj.packed(GROUP), ValueError, r"segment_ids .*\[B T\]", r"got shape \(2, 6, 4\)"),
    "ids of floats": (lambda: sfj.packed(Q[..., 0, 0]), TypeError, "segment_ids must be int32", "got float32"),
    "other batch of ids": (
        lambda: sfj.packed(GROUP[..., 0], jnp.zeros((3, 5), jnp.int32)),
        ValueError,
        "must agree in batch size",
        "got 2 and 3",
    ),
    "buckets of floats": (lambda: sfj.hash_sparse(Q[..., 0], KEY_GROUP), TypeError, "must be int32", "got float32"),
    "number of buckets by place": (
        lambda: sfj.hash_sparse(GROUP, KEY_GROUP, 16),
        TypeError,
        "causal must be True or False",
        "got 16; name the options",
    ),
    "keeps of integers": (lambda: sfj.qk_sparse(GROUP, KEY_KEEP), TypeError, "must be bool", "got int32"),
    "tiles of none": (lambda: PLAN.stats(block_q=0), ValueError, "block_q must be at least 1", "got 0"),
}

CHOICES = {
    "odd buckets": (lambda: sfj.lsh_buckets(Q, 7, KEY), ValueError, "num_buckets must be even", "got 7"),
    "no buckets": (lambda: sfj.lsh_buckets(Q, 0, KEY), ValueError, "num_buckets must be at least", "got 0"),
    "fractional buckets": (lambda: sfj.lsh_buckets(Q, 8.0, KEY), TypeError, "num_buckets must be a", "got float"),
    "hash of integers": (lambda: sfj.lsh_buckets(GROUP[..., None], 8, KEY), TypeError, "x must be float", "got int32"),
    "hash of rank 3": (lambda: sfj.lsh_buckets(Q[0], 8, KEY), ValueError, r"x .*\[B T N H\]", r"got shape \(6, 4, 8\)"),
    "rotations that do not divide": (
        lambda: sfj.lsh_buckets(Q, 8, KEY, num_rotations=3),
        ValueError,
        "num_rotations must divide the number of heads 4",
        "got 3",
    ),
    "odd buckets of the whole": (
        lambda: sfj.hash_sparse_attention(Q, K, V, 5, KEY),
        ValueError,
        "num_buckets must be even",
        "got 5",
    ),
    "integers kept by the whole": (
        lambda: sfj.qk_sparse_attention(Q, K, V, GROUP, KEY_KEEP),
        TypeError,
        "query_keep must be bool",
        "got int32",
    ),
    "shape of two": (lambda: sfj.random_keep(KEY, (2, 6), 0.5), ValueError, r"shape must be \(B, T, N\)", r"\(2, 6\)"),
    "rate above one": (lambda: sfj.random_keep(KEY, (2, 6, 4), 1.5), ValueError, r"rate must be in \[0, 1", "got 1.5"),
    "negative rate": (lambda: sfj.random_keep(KEY, (2, 6, 4), -0.1), ValueError, r"rate must be in", "got -0.1"),
    "scores of integers": (lambda: sfj.top_keep(GROUP, 2), TypeError, "scores must be float32", "got int32"),
    "more than all": (lambda: sfj.top_keep(Q[..., 0], 7), ValueError, "count must be at most .*6", "got 7"),
    "less than none": (lambda: sfj.top_keep(Q[..., 0], -1), ValueError, "count must be at least 0", "got -1"),
}

TABLE = {**ATTENTION, **PLANS, **CHOICES}


@pytest.mark.parametrize("name", TABLE)
def test_wrong_call(name):
    call, error, expected, got = TABLE[name]
    with pytest.raises(error) as raised:
        call()
    assert raised.type is error
    raised.match(expected)
    raised.match(got)


def test_right_call_of_an_implementation_that_cannot():
    with pytest.raises(NotImplementedError, match=r"implementation='mosaic'.*use implementation='xla'"):
        attend(implementation="mosaic")


def test_exclude_self_both_ways():
    with pytest.raises(ValueError, match="exclude_self=True needs causal=True"):
        sfj.hash_sparse(GROUP, KEY_GROUP, causal=False, exclude_self=True)


def test_neither_group_nor_keep():
    with pytest.raises(ValueError, match=r"query_group or query_keep must be given.*use causal\(\)"):
        sfj.make_plan()


@pytest.mark.parametrize("scale", [2, 0.5, np.float32(0.5), None])
def test_right_scales(scale):
    assert attend(scale=scale).shape == Q.shape


def test_numpy_arrays_will_do():
    plan = sfj.hash_sparse(np.asarray(GROUP), np.asarray(KEY_GROUP))
    assert attend(np.asarray(Q), np.asarray(K), np.asarray(V), plan).shape == Q.shape
