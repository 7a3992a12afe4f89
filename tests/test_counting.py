"""Plans by counting are the plans by sorting, integer for integer; and the kernels lower for CUDA."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import sparse_flash_jax as sfj
from sparse_flash_jax.kernels.triton.counting import CHUNK, count_tokens
from tests.cases import Shape, buckets, half_in_one
from tests.gpus import GPUS, lowered, mesh_of, on

SHAPES = {
    "part_of_a_chunk": (Shape(B=1, T=100, N=1, H=1), 4),
    "one_chunk": (Shape(B=1, T=CHUNK, N=1, H=1), 16),
    "gqa": (Shape(B=2, T=600, N=4, K=2, H=1), 16),
    "more_keys": (Shape(B=1, T=70, N=2, K=1, S=530, H=1), 31),
    "most_buckets": (Shape(B=1, T=1100, N=2, H=1), 256),
}


def sides(shape, count, share_dropped, draw=buckets):
    """Bucket ids and keep masks [B L A] of queries and keys."""
    rng = np.random.default_rng(shape.T)
    ids = draw(count)(rng, shape)
    keep = [jnp.asarray(rng.random(axes) >= share_dropped) for axes in (shape.query_axes, shape.key_axes)]
    return [jnp.asarray(ids[name]) for name in ("query_group", "key_group")], keep


def counted(ids, keep, count, **rule):
    slots = tuple(x.shape[1] for x in ids)
    laid_out = [jnp.where(k, x, count).swapaxes(1, 2) for x, k in zip(ids, keep, strict=True)]
    return jax.jit(functools.partial(count_tokens, buckets=count, slots=slots, interpret=True, **rule))(*laid_out)


def assert_same_plan(got, plan):
    queries, keys, runs = got
    pairs = {
        "query_order": (queries.order, plan.query_order),
        "query_slot": (queries.slot, plan.query_slot),
        "key_order": (keys.order, plan.key_order),
        "key_slot": (keys.slot, plan.key_slot),
        "kept_keys": (keys.kept, plan.kept_keys),
        "largest_group": (keys.largest, plan.largest_group),
        **{name: (x, getattr(plan.runs, name)) for name, x in runs._asdict().items()},
    }
    for name, (x, y) in pairs.items():
        np.testing.assert_array_equal(x, y, name)


@pytest.mark.parametrize("share_dropped", [0.0, 0.3])
@pytest.mark.parametrize("name", SHAPES)
def test_equal_to_the_plan_by_sorting(name, share_dropped):
    shape, count = SHAPES[name]
    ids, keep = sides(shape, count, share_dropped)
    plan = sfj.make_plan(query_group=ids[0], key_group=ids[1], query_keep=keep[0], key_keep=keep[1])
    assert_same_plan(counted(ids, keep, count, causal=True, exclude_self=False), plan)


@pytest.mark.parametrize(("causal", "exclude_self"), [(False, False), (True, True)])
def test_rules(causal, exclude_self):
    ids, keep = sides(Shape(B=1, T=600, N=2, H=1), 8, 0.1, half_in_one)
    rule = {"causal": causal, "exclude_self": exclude_self}
    plan = sfj.make_plan(query_group=ids[0], key_group=ids[1], query_keep=keep[0], key_keep=keep[1], **rule)
    assert_same_plan(counted(ids, keep, 8, **rule), plan)


@pytest.mark.parametrize("who", ["nobody", "queries", "everybody"])
def test_all_dropped(who):
    ids, keep = sides(Shape(B=1, T=300, N=1, H=1), 4, 0.0)
    keep = [keep[0] & (who == "nobody"), keep[1] & (who != "everybody")]
    plan = sfj.make_plan(query_group=ids[0], key_group=ids[1], query_keep=keep[0], key_keep=keep[1])
    assert_same_plan(counted(ids, keep, 4, causal=True, exclude_self=False), plan)


PLANS = {
    "buckets": ({}, True),
    "shared": ({"shared": True}, True),
    "exclude_self": ({"exclude_self": True, "shared": True}, True),
    "both_ways": ({"causal": False}, True),
    "dropped": ({"dropped": 0.4}, True),
    "window": ({"window": 30}, False),
    "offset": ({"query_offset": 7}, False),
}


@pytest.fixture
def asked(monkeypatch):
    """Plans as with a GPU, whose kernels are interpreted; the list of times that they were asked for."""
    asked = []

    def kernels():
        asked.append(count_tokens)
        return functools.partial(count_tokens, interpret=True)

    monkeypatch.setattr("sparse_flash_jax.planning.counting_kernels", kernels)
    monkeypatch.setattr("jax.lax.platform_dependent", lambda *operands, cuda, default: cuda(*operands))
    return asked


@pytest.mark.parametrize("name", PLANS)
def test_plans_of_known_buckets_are_counted(asked, name):
    """The same plan as without the number of buckets, and the kernels asked for where they can make it."""
    options, by_counting = dict(PLANS[name][0]), PLANS[name][1]
    ids, keep = sides(Shape(B=2, T=300, N=2, K=1, H=1), 5, options.get("dropped", 0.0))
    ids = [ids[0], ids[0]] if options.pop("shared", False) else ids
    if options.pop("dropped", 0.0):
        options |= {"query_keep": keep[0], "key_keep": keep[1]}
    expected = sfj.make_plan(query_group=ids[0], key_group=ids[1], **options)
    got = sfj.make_plan(query_group=ids[0], key_group=ids[1], num_buckets=5, **options)
    assert bool(asked) == by_counting
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize(
    ("options", "by_counting"),
    [({"query_capacity": 300, "key_capacity": 900}, True), ({"key_capacity": 299}, False)],
    ids=["not_cut", "cut"],
)
def test_capacities_of_buckets(asked, options, by_counting):
    ids, keep = sides(Shape(B=2, T=300, N=2, K=1, H=1), 5, 0.4)
    options = {**options, "query_group": ids[0], "key_group": ids[1], "query_keep": keep[0], "key_keep": keep[1]}
    expected = sfj.make_plan(**options)
    got = sfj.make_plan(**options, num_buckets=5)
    assert bool(asked) == by_counting
    jax.tree.map(np.testing.assert_array_equal, got, expected)


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
    return sfj.make_plan(**{**keeps, **options, **offset})


def assert_dropped_plans_agree(keep, options):
    """Under jit, where what does not fit is dropped."""
    got, expected = (
        jax.jit(functools.partial(dropped_plan, counted=counted, **options))(keep) for counted in (True, False)
    )
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("name", DROPPED)
def test_dropping_is_counted(asked, name):
    _, keep = sides(Shape(B=2, T=300, N=4, K=2, H=1), 1, 0.3)
    assert_dropped_plans_agree(keep, DROPPED[name])
    assert len(asked) == 1


@pytest.mark.parametrize("keys", [170, 530])
@pytest.mark.parametrize("of_one_entry", [False, True])
def test_dropping_of_sides_that_differ(asked, of_one_entry, keys):
    """In length, and in whether batch entries and heads are told apart."""
    _, keep = sides(Shape(B=2, T=300, N=2, K=1, S=keys, H=1), 1, 0.3)
    keep[0] = keep[0][:1, :, :1] if of_one_entry else keep[0]
    assert_dropped_plans_agree(keep, {"query_capacity": 200, "key_capacity": 150})
    assert len(asked) == 1


def test_buckets_of_one_batch_entry_beside_several(asked):
    ids, _ = sides(Shape(B=2, T=300, N=2, K=1, H=1), 5, 0.0)
    got, expected = (sfj.hash_sparse(ids[0], ids[1][:1], num_buckets=count) for count in (5, None))
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert len(asked) == 1


def test_overflow_raises_outside_jit(asked):
    _, keep = sides(Shape(B=1, T=300, N=1, H=1), 1, 0.3)
    with pytest.raises(ValueError, match=r"key_capacity=70 is too small: head 0 of batch entry 0 keeps"):
        dropped_plan(keep, counted=True, key_capacity=70)
    assert asked


@pytest.mark.parametrize(
    "plan",
    [
        lambda keep: sfj.qk_sparse(keep, keep, window=9),
        lambda keep: sfj.make_plan(query_keep=keep, key_keep=keep, query_offset=3),
        lambda keep: sfj.causal(keep.shape[1]),
    ],
    ids=["window", "offset", "nothing_dropped"],
)
def test_not_counted(asked, plan):
    plan(jnp.arange(300)[None, :, None] % 3 > 0)
    assert not asked


@pytest.mark.gpu
@pytest.mark.parametrize("name", DROPPED)
@pytest.mark.parametrize("shape", [Shape(B=2, T=300, N=4, K=2, H=1), Shape(B=2, T=16_384, N=12, H=1)])
def test_dropping_on_a_gpu(shape, name):
    _, keep = sides(shape, 1, 0.3)
    assert_dropped_plans_agree(keep, DROPPED[name])


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize(
    ("shape", "count"),
    [*SHAPES.values(), (Shape(B=2, T=16_384, N=12, H=1), 16), (Shape(B=1, T=100_000, N=3, H=1), 200)],
)
def test_counted_on_a_gpu(shape, count, dropped, causal):
    ids, keep = sides(shape, count, 0.3)

    def plan(ids, keep, **options):
        keeps = {"query_keep": keep[0], "key_keep": keep[-1]} if dropped else {}
        return sfj.make_plan(query_group=ids[0], key_group=ids[-1], causal=causal, **keeps, **options)

    for n in (1, 2) if shape.keys == shape.T else (2,):  # the same array on both sides is planned once
        got = jax.jit(functools.partial(plan, num_buckets=count))(ids[:n], keep[:n])
        jax.tree.map(np.testing.assert_array_equal, got, plan(ids[:n], keep[:n]))


def assert_others_are_dropped():
    ids, _ = sides(Shape(B=1, T=300, N=2, H=1), 8, 0.0)
    ids = [x - 1 for x in ids]
    with pytest.raises(ValueError, match=r"query_group must be in \[0, num_buckets=5\), got ids from -1 to 6"):
        sfj.hash_sparse(ids[0], ids[1], num_buckets=5)
    got = jax.jit(lambda ids: sfj.hash_sparse(ids[0], ids[1], num_buckets=5))(ids)
    keep = [(x >= 0) & (x < 5) for x in ids]
    expected = sfj.make_plan(query_group=ids[0], key_group=ids[1], query_keep=keep[0], key_keep=keep[1])
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_ids_that_are_no_bucket():
    """Refused where they are known, dropped where they are traced."""
    assert_others_are_dropped()


def test_ids_that_are_no_bucket_of_those_counted(asked):
    assert_others_are_dropped()
    assert asked


def test_vmap(asked):
    ids, _ = sides(Shape(B=3, T=300, N=2, H=1), 8, 0.0)
    split = [x[:, None] for x in ids]
    got = jax.vmap(lambda query, key: sfj.hash_sparse(query, key, num_buckets=8))(*split)
    expected = jax.vmap(lambda query, key: sfj.hash_sparse(query, key))(*split)
    assert asked
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_lowers_for_cuda_under_shard_map(monkeypatch):
    """Over batch entries, where the keys' ids are the same everywhere. (The interpreter knows no mesh axes.)"""
    monkeypatch.setattr("sparse_flash_jax.planning.counting_kernels", lambda: count_tokens)
    mesh = mesh_of("NVIDIA H100 80GB HBM3")
    spec, ids = PartitionSpec("data"), jnp.zeros((jax.device_count(), 300, 2), jnp.int32)
    plan = lambda query, key: sfj.hash_sparse(query, key, num_buckets=8).runs
    call = jax.shard_map(plan, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec)
    with on("NVIDIA H100 80GB HBM3"):
        assert "__gpu$xla.gpu.triton" in lowered(call, ids, ids[:1])


def test_a_gpus_host_plans_on_its_cpu(monkeypatch):
    monkeypatch.setattr("sparse_flash_jax.planning.counting_kernels", lambda: count_tokens)
    ids, _ = sides(Shape(B=1, T=300, N=2, H=1), 8, 0.0)
    plan = jax.jit(lambda query, key: sfj.hash_sparse(query, key, num_buckets=8))
    jax.tree.map(np.testing.assert_array_equal, plan(*ids), sfj.hash_sparse(ids[0], ids[1]))
    with on("NVIDIA H100 80GB HBM3"):
        assert "__gpu$xla.gpu.triton" in lowered(lambda query, key: sfj.hash_sparse(query, key, num_buckets=8), *ids)


def test_dropping_is_vmapped(asked):
    _, keep = sides(Shape(B=3, T=300, N=2, H=1), 1, 0.3)
    plan = lambda keep, counted: dropped_plan([x[None] for x in keep], counted=counted, query_capacity=250)
    got, expected = (jax.vmap(functools.partial(plan, counted=counted))(keep) for counted in (True, False))
    assert asked
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("kind", GPUS)
def test_dropping_lowers_for_cuda(monkeypatch, kind):
    """Without a sort, where a GPU is lowered for."""
    monkeypatch.setattr("sparse_flash_jax.planning.counting_kernels", lambda: count_tokens)
    _, keep = sides(Shape(B=2, T=300, N=2, H=1), 1, 0.3)
    plan = lambda query, key: sfj.qk_sparse(query, key, query_capacity=210, key_capacity=220)
    with on(kind):
        text = lowered(plan, *keep)
    assert text.count("__gpu$xla.gpu.triton") == 3
    assert "stablehlo.sort" not in text


@pytest.mark.parametrize("kind", GPUS)
@pytest.mark.parametrize("count", [16, 256])
def test_lowers_for_cuda(kind, count):
    ids = jax.ShapeDtypeStruct((2, 4, 1000), jnp.int32)
    with on(kind):
        text = lowered(
            functools.partial(count_tokens, buckets=count, slots=(1000, 1000), causal=True, exclude_self=False),
            ids,
            ids,
        )
    assert text.count("__gpu$xla.gpu.triton") == 3
