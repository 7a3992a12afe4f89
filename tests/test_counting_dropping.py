"""Plans that drop tokens are counted, too: keep masks and capacities, integer for integer as by sorting."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparse_flash_jax as sfj
from tests.cases import Shape
from tests.gpus import GPUS, lowered, on, put_device
from tests.test_counting import counted_shapes as counted_shapes
from tests.test_counting import sides

DROPPED = {
    "both_sides": {},
    "shared": {"shared": True},
    "queries": {"num_buckets": 1, "key_keep": None},
    "keys": {"num_buckets": 1, "query_keep": None, "query_capacity": 256},
    "both_ways": {"causal": False},
    "exclude_self": {"exclude_self": True},
    "capacities_that_fit": {"query_capacity": 260, "key_capacity": 900},
    "overflow": {"query_capacity": 100, "key_capacity": 70},
    "overflow_of_all_heads": {"query_capacity": 64, "key_capacity": 64, "shared": True},
    "overflow_both_ways": {"key_capacity": 65, "causal": False},
    "one_slot": {"query_capacity": 1, "key_capacity": 1},
    "one_bucket": {"num_buckets": 1, "query_capacity": 100, "key_capacity": 400},
}


def dropped_plan(keep, *, counted, shared=False, **options):
    """With a traced offset a plan is sorted."""
    keeps: dict[str, Any] = {"query_keep": keep[0], "key_keep": keep[0] if shared else keep[1]}
    if "num_buckets" in options:
        keeps |= {
            f"{side}_group": jnp.zeros(x.shape, jnp.int32) for side, x in zip(("query", "key"), keep, strict=True)
        }
    offset = {} if counted else {"query_offset": jnp.int32(0)}
    return sfj.make_plan(**{**keeps, **options, **offset})._replace(query_offset=None)


def assert_dropped_plans_agree(keep, options):
    """Under jit, where what does not fit is dropped."""
    got, expected = (
        jax.jit(functools.partial(dropped_plan, counted=counted, **options))(keep) for counted in (True, False)
    )
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("name", DROPPED)
def test_dropping_is_counted(counted_shapes, name):
    _, keep = sides(Shape(B=2, T=300, N=4, K=2, H=1), 1, 0.3)
    assert_dropped_plans_agree(keep, DROPPED[name])
    assert len(counted_shapes) == 1


@pytest.mark.parametrize("keys", [170, 530])
@pytest.mark.parametrize("of_one_entry", [False, True])
def test_dropping_of_sides_that_differ(counted_shapes, of_one_entry, keys):
    """In length, and in whether batch entries and heads are told apart."""
    _, keep = sides(Shape(B=2, T=300, N=2, K=1, S=keys, H=1), 1, 0.3)
    keep[0] = keep[0][:1, :, :1] if of_one_entry else keep[0]
    assert_dropped_plans_agree(keep, {"query_capacity": 200, "key_capacity": 150})
    assert len(counted_shapes) == 1


@pytest.mark.parametrize(
    ("options", "by_counting"),
    [({"query_capacity": 300, "key_capacity": 900}, True), ({"key_capacity": 299}, False)],
    ids=["not_cut", "cut"],
)
def test_capacities_of_buckets(counted_shapes, options, by_counting):
    ids, keep = sides(Shape(B=2, T=300, N=2, K=1, H=1), 5, 0.4)
    options = {**options, "query_group": ids[0], "key_group": ids[1], "query_keep": keep[0], "key_keep": keep[1]}
    expected = sfj.make_plan(**options)
    got = sfj.make_plan(**options, num_buckets=5)
    assert bool(counted_shapes) == by_counting
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_overflow_raises_outside_jit(counted_shapes):
    _, keep = sides(Shape(B=1, T=300, N=1, H=1), 1, 0.3)
    with pytest.raises(ValueError, match=r"key_capacity=70 is too small: head 0 of batch entry 0 keeps"):
        dropped_plan(keep, counted=True, key_capacity=70)
    assert counted_shapes


@pytest.mark.parametrize(
    "plan",
    [
        lambda keep: sfj.qk_sparse(keep, keep, window=9),
        lambda keep: sfj.make_plan(query_keep=keep, key_keep=keep, query_offset=3),
        lambda keep: sfj.causal(keep.shape[1]),
    ],
    ids=["window", "offset", "nothing_dropped"],
)
def test_not_counted(counted_shapes, plan):
    plan(jnp.arange(300)[None, :, None] % 3 > 0)
    assert not counted_shapes


def test_dropping_is_vmapped(counted_shapes):
    _, keep = sides(Shape(B=3, T=300, N=2, H=1), 1, 0.3)
    plan = lambda keep, counted: dropped_plan([x[None] for x in keep], counted=counted, query_capacity=250)
    got, expected = (jax.vmap(functools.partial(plan, counted=counted))(keep) for counted in (True, False))
    assert counted_shapes
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("kind", GPUS)
def test_dropping_lowers_for_cuda(monkeypatch, kind):
    """Without a sort, where a GPU is lowered for."""
    put_device(monkeypatch)
    _, keep = sides(Shape(B=2, T=300, N=2, H=1), 1, 0.3)
    plan = lambda query, key: sfj.qk_sparse(query, key, query_capacity=210, key_capacity=220)
    with on(kind):
        text = lowered(plan, *keep)
    assert text.count("__gpu$xla.gpu.triton") == 3
    assert "stablehlo.sort" not in text


@pytest.mark.gpu
@pytest.mark.parametrize("name", DROPPED)
@pytest.mark.parametrize("shape", [Shape(B=2, T=300, N=4, K=2, H=1), Shape(B=2, T=16_384, N=12, H=1)])
def test_dropping_on_a_gpu(shape, name):
    _, keep = sides(shape, 1, 0.3)
    assert_dropped_plans_agree(keep, DROPPED[name])
