"""Plans by counting are the plans by sorting, integer for integer; and the kernels lower for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import sparse_flash_jax as sfj
from sparse_flash_jax.kernels.triton.counting import CHUNK, count_tokens
from tests.cases import Shape, buckets, half_in_one
from tests.gpus import GPUS, H100, lowered, mesh_of, on, put_device, put_interpreted

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
def counted_shapes(monkeypatch):
    """Plans as with a GPU, whose kernels are interpreted; the shapes that they counted."""
    return put_interpreted(monkeypatch, "sparse_flash_jax.planning.counting_kernels", count_tokens)


@pytest.mark.parametrize("name", PLANS)
def test_plans_of_known_buckets_are_counted(counted_shapes, name):
    """The same plan as without the number of buckets, and by the kernels where they can make it."""
    options, by_counting = dict(PLANS[name][0]), PLANS[name][1]
    ids, keep = sides(Shape(B=2, T=300, N=2, K=1, H=1), 5, options.get("dropped", 0.0))
    ids = [ids[0], ids[0]] if options.pop("shared", False) else ids
    if options.pop("dropped", 0.0):
        options |= {"query_keep": keep[0], "key_keep": keep[1]}
    expected = sfj.make_plan(query_group=ids[0], key_group=ids[1], **options)
    got = sfj.make_plan(query_group=ids[0], key_group=ids[1], num_buckets=5, **options)
    assert bool(counted_shapes) == by_counting
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_buckets_of_one_batch_entry_beside_several(counted_shapes):
    ids, _ = sides(Shape(B=2, T=300, N=2, K=1, H=1), 5, 0.0)
    got, expected = (sfj.hash_sparse(ids[0], ids[1][:1], num_buckets=count) for count in (5, None))
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert len(counted_shapes) == 1


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
    queries, keys = (jnp.sum(~x, axis=1, dtype=jnp.int32) for x in keep)
    expected = expected._replace(query_overflow=queries, key_overflow=keys)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_ids_that_are_no_bucket():
    """Refused where they are known, dropped and counted where they are traced."""
    assert_others_are_dropped()


def test_ids_that_are_no_bucket_of_those_counted(counted_shapes):
    assert_others_are_dropped()
    assert counted_shapes


def test_vmap(counted_shapes):
    ids, _ = sides(Shape(B=3, T=300, N=2, H=1), 8, 0.0)
    split = [x[:, None] for x in ids]
    got = jax.vmap(lambda query, key: sfj.hash_sparse(query, key, num_buckets=8))(*split)
    expected = jax.vmap(lambda query, key: sfj.hash_sparse(query, key))(*split)
    assert counted_shapes
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_lowers_for_cuda_under_shard_map(monkeypatch):
    """Over batch entries, where the keys' ids are the same everywhere. (The interpreter knows no mesh axes.)"""
    put_device(monkeypatch)
    mesh = mesh_of(H100)
    spec, ids = PartitionSpec("data"), jnp.zeros((jax.device_count(), 300, 2), jnp.int32)
    plan = lambda query, key: sfj.hash_sparse(query, key, num_buckets=8).runs
    call = jax.shard_map(plan, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec)
    with on(H100):
        assert "__gpu$xla.gpu.triton" in lowered(call, ids, ids[:1])


def test_a_gpus_host_plans_on_its_cpu(monkeypatch):
    put_device(monkeypatch)
    ids, _ = sides(Shape(B=1, T=300, N=2, H=1), 8, 0.0)
    plan = jax.jit(lambda query, key: sfj.hash_sparse(query, key, num_buckets=8))
    jax.tree.map(np.testing.assert_array_equal, plan(*ids), sfj.hash_sparse(ids[0], ids[1]))
    with on(H100):
        assert "__gpu$xla.gpu.triton" in lowered(lambda query, key: sfj.hash_sparse(query, key, num_buckets=8), *ids)


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
