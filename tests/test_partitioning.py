"""Plain `jit` over many devices: the numbers of one device, and nothing moves between them."""

import functools
import re
from types import SimpleNamespace

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import sparse_flash_jax as sfj
from sparse_flash_jax import partitioning
from sparse_flash_jax.partitioning import by_batch_and_head
from tests.gpus import H100, on, put_device
from tests.test_transforms import assert_same, attended

BATCH, LENGTH, HEAD_DIM, BUCKETS = 4, 40, 8, 4
MOVES = re.compile(r"\b(all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute)(-start)?\(")
KEY = jax.random.key(3)
KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")


def planned_from_ids(q, k, v, do, query_bucket, key_bucket):
    return attended(q, k, v, do, sfj.hash_sparse(query_bucket, key_bucket, exclude_self=True))


def hashed(q, k, v, do, *_):
    ids = sfj.lsh_buckets(q, BUCKETS, KEY, num_rotations=k.shape[2]), sfj.lsh_buckets(k, BUCKETS, KEY, centred=True)
    return attended(q, k, v, do, sfj.hash_sparse(*ids, num_buckets=BUCKETS))


def dropped(q, k, v, do, query_bucket, key_bucket):
    plan = sfj.qk_sparse(query_bucket > 0, key_bucket > 1, query_capacity=LENGTH - 1)
    return attended(q, k, v, do, plan)


def chosen(q, k, v, do, *_):
    keep = sfj.top_keep(q[..., 0], LENGTH // 2), sfj.random_keep(KEY, k.shape[:3], (0.5, *[0.8] * (k.shape[2] - 1)))
    return attended(q, k, v, do, sfj.qk_sparse(*keep, query_capacity=LENGTH // 2, key_capacity=LENGTH // 2))


def packed(q, k, v, do, *_):
    documents = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32)[None] // 7, (BATCH, LENGTH))
    return attended(q, k, v, do, sfj.packed(documents))


def causal(q, k, v, do, *_):
    return attended(q, k, v, do, sfj.causal(LENGTH, window=9))


def sloped(q, k, v, do, query_bucket, key_bucket):
    slopes = jnp.exp2(-jnp.arange(q.shape[2], dtype=jnp.float32))
    return attended(q, k, v, do, sfj.hash_sparse(query_bucket, key_bucket), alibi_slopes=slopes)


def in_rounds(q, k, v, do, *_):
    """The ids of the first round are compared in the second."""
    attend = functools.partial(sfj.hash_sparse_attention, num_buckets=BUCKETS, key=KEY, rounds=2, return_residual=True)
    (o, lse), vjp = jax.vjp(attend, q, k, v)
    return o, lse, *vjp((do, jnp.ones_like(lse)))


def arrays(heads, key_heads):
    """q, k, v, a cotangent, and bucket ids of queries and keys."""
    rng = np.random.default_rng(heads + key_heads)
    queries, keys = (BATCH, LENGTH, heads), (BATCH, LENGTH, key_heads)
    q, k, v, do = (
        jnp.asarray(rng.standard_normal((*s, HEAD_DIM)), jnp.float32) for s in (queries, keys, keys, queries)
    )
    return q, k, v, do, *(jnp.asarray(rng.integers(0, BUCKETS, s), jnp.int32) for s in (queries, keys))


def divided(operands, kind, over, shape=(2, 4)):
    """The operands over a mesh, batch and heads divided as `over` says, what has one head over the batch alone."""
    mesh = jax.make_mesh(shape, ("data", "tensor"), axis_types=(kind,) * 2)
    batch, heads = over

    def put(x):
        spec = PartitionSpec(batch, None, heads if x.shape[2] > 1 else None, *[None] * (x.ndim - 3))
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree.map(put, operands)


def moved(compiled):
    """What a program moves between devices."""
    return {found[0] for found in MOVES.findall(compiled.as_text())}


def assert_as_on_one_device(function, operands, over, kind, *, moves=(), shape=(2, 4)):
    expected = jax.jit(function)(*operands)
    parts = divided(operands, kind, over, shape)
    compiled = jax.jit(function).lower(*parts).compile()
    assert moved(compiled) == set(moves)
    got = compiled(*parts)
    assert_same(got, expected)
    return got, parts


PLANNED = (planned_from_ids, hashed, dropped, chosen, packed, causal, sloped, in_rounds)


# By automatic axes all; by explicit ones, which take the same way from `_shares` on, those that differ before it.
@pytest.mark.parametrize(
    ("function", "kind"),
    [
        *((each, AxisType.Auto) for each in PLANNED),
        *((each, AxisType.Explicit) for each in (hashed, chosen, in_rounds)),
    ],
)
def test_nothing_moves(function, kind):
    got, parts = assert_as_on_one_device(function, arrays(8, 4), ("data", "tensor"), kind)
    for x, part in zip((got[0], *got[2:]), (parts[0], *parts[:3]), strict=True):
        assert x.sharding.is_equivalent_to(part.sharding, x.ndim)


@KINDS
@pytest.mark.parametrize("over", [("data", None), (None, "tensor"), (("data", "tensor"), None), (None, ("data",))])
def test_any_mesh_axes(over, kind):
    heads = 8
    operands = [jnp.concatenate([x, x]) for x in arrays(heads, 4)] if isinstance(over[0], tuple) else arrays(heads, 4)
    assert_as_on_one_device(planned_from_ids, operands, over, kind)


@KINDS
def test_one_key_head_for_all(kind):
    """Each device has a part of its query heads, and what they add to its gradients is summed."""
    assert_as_on_one_device(hashed, arrays(4, 1), ("data", "tensor"), kind, moves=["all-reduce"])


def test_more_devices_than_key_heads():
    """Nothing to divide: heads are gathered, and the numbers are right."""
    operands = arrays(8, 2)
    expected = jax.jit(planned_from_ids)(*operands)
    q, k, v, do, query_bucket, key_bucket = operands
    parts = divided((q, do, query_bucket), AxisType.Auto, ("data", "tensor"))
    shared = divided((k, v, key_bucket), AxisType.Auto, ("data", None))
    got = jax.jit(planned_from_ids)(parts[0], shared[0], shared[1], parts[1], parts[2], shared[2])
    assert_same(got, expected)


def test_a_plan_that_all_share():
    """Of one batch entry and head: it is whole on every device."""
    q, k, v, do, *_ = arrays(8, 8)
    bucket = jnp.asarray(np.random.default_rng(0).integers(0, BUCKETS, (1, LENGTH, 1)), jnp.int32)

    def alike(q, k, v, do, bucket):
        return attended(q, k, v, do, sfj.hash_sparse(bucket, bucket))

    expected = jax.jit(alike)(q, k, v, do, bucket)
    parts = divided((q, k, v, do), AxisType.Auto, ("data", "tensor"))
    compiled = jax.jit(alike).lower(*parts, bucket).compile()
    assert not moved(compiled)
    assert_same(compiled(*parts, bucket), expected)


@KINDS
@pytest.mark.parametrize("how", ["remat", "scan"])
def test_inside_of_others(how, kind):
    def attend(q, k, v):
        return sfj.hash_sparse_attention(q, k, v, BUCKETS, KEY)

    def loss(q, k, v):
        if how == "remat":
            policy = jax.checkpoint_policies.save_only_these_names(*sfj.RESIDUAL_NAMES, sfj.PLAN_NAME)
            return jnp.sum(jax.checkpoint(attend, policy=policy)(q, k, v) ** 2)
        return jnp.sum(jax.lax.scan(lambda x, _: (attend(x, k, v), None), q, length=2)[0] ** 2)

    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    operands = arrays(4, 4)[:3]
    for got, expected in zip(step(*divided(operands, kind, ("data", "tensor"))), step(*operands), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)  # the loss is not linear: roundings grow


def test_vmap_is_right_but_gathers():
    q, k, v, *_ = arrays(4, 4)
    attend = functools.partial(sfj.hash_sparse_attention, num_buckets=BUCKETS, key=KEY)
    mapped = jax.jit(jax.vmap(attend))
    split = [x.reshape(2, 2, *x.shape[1:]) for x in (q, k, v)]
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    place = NamedSharding(mesh, PartitionSpec(None, "data", None, "tensor"))
    got = mapped(*(jax.device_put(x, place) for x in split))
    assert_same((got.reshape(q.shape),), (attend(q, k, v),))


@KINDS
def test_outside_of_jit(kind):
    q, k, v, *_ = arrays(4, 4)
    parts = divided((q, k, v), kind, ("data", "tensor"))
    got, expected = (sfj.hash_sparse_attention(q, k, v, BUCKETS, KEY) for q, k, v in (parts, (q, k, v)))
    assert_same((got,), (expected,))


@KINDS
def test_positions_are_hashed_where_they_are(kind):
    """But for a running mean, which is of all before: that gathers them."""
    x = arrays(4, 4)[0]
    mesh = jax.make_mesh((2, 4), ("data", "sequence"), axis_types=(kind,) * 2)
    part = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data", "sequence")))
    for centred, moves in ((False, set()), (True, {"all-gather"})):
        hashed = jax.jit(functools.partial(sfj.lsh_buckets, num_buckets=BUCKETS, key=KEY, centred=centred))
        compiled = hashed.lower(part).compile()
        assert moved(compiled) == moves
        np.testing.assert_array_equal(compiled(part), hashed(x))


@pytest.fixture
def lowered_once(monkeypatch):
    """Calls are lowered once here, as those of Mosaic's kernels on GPUs."""
    monkeypatch.setattr(partitioning, "_long_to_lower_for", lambda device: device.platform)
    monkeypatch.setattr(partitioning, "_LONG_TO_LOWER", b"")


@KINDS
@pytest.mark.parametrize("over", [("data", "tensor"), (None, None)])
def test_a_mesh_that_is_set(over, kind, lowered_once):
    operands = arrays(4, 4)[:3]
    parts = divided(operands, kind, over)
    attend = jax.jit(lambda q, k, v: sfj.hash_sparse_attention(q, k, v, BUCKETS, KEY))
    with jax.set_mesh(parts[0].sharding.mesh):
        got = attend(*parts)
    assert_same((got,), (attend(*operands),))


def doubling():
    """A function that doubles by batch entry and head, an array to double, and the shapes at which it was traced."""
    shapes = []

    def double(x):
        shapes.append(x.shape)
        return 2 * x

    x = divided(arrays(4, 4)[0], AxisType.Auto, ("data", "tensor"))
    return jax.jit(lambda x: by_batch_and_head(double, (x,), ("btn-",), "btn-")), x, shapes


@pytest.mark.parametrize("layers", [1, 3])
def test_layers_alike_are_lowered_once(layers, lowered_once):
    layer, x, shapes = doubling()
    chain = jax.jit(lambda x: functools.reduce(lambda x, _: layer(x), range(layers), x))
    np.testing.assert_array_equal(chain(x), 2**layers * x)
    assert shapes == [(BATCH, LENGTH, 4, HEAD_DIM), (BATCH // 2, LENGTH, 1, HEAD_DIM)]


@pytest.mark.parametrize(("function", "key_heads", "moves"), [(planned_from_ids, 4, []), (hashed, 1, ["all-reduce"])])
def test_lowered_once_as_on_one_device(function, key_heads, moves, lowered_once):
    operands = arrays(8 if key_heads > 1 else 4, key_heads)
    assert_as_on_one_device(function, operands, ("data", "tensor"), AxisType.Auto, moves=moves)


def test_what_is_quick_to_lower_is_lowered_for_each_call(lowered_once, monkeypatch):
    monkeypatch.setattr(partitioning, "_LONG_TO_LOWER", b"mosaic_gpu")
    layer, x, shapes = doubling()
    np.testing.assert_array_equal(jax.jit(lambda x: layer(layer(x)))(x), 4 * x)
    assert shapes[1:] == [(BATCH // 2, LENGTH, 1, HEAD_DIM)] * 3  # once to see that it is quick


def test_compiled_while_something_else_is_traced(lowered_once):
    layer, x, _ = doubling()
    compiled = []
    jax.jit(lambda y: compiled.append(layer.lower(x).compile()) or y)(1.0)
    np.testing.assert_array_equal(compiled[0](x), 2 * x)


def test_kernels_can_be_exported(monkeypatch):
    put_device(monkeypatch)
    monkeypatch.setattr(jax, "device_count", lambda: 1)

    def gradients(q, k, v, key):
        attend = lambda q, k, v: sfj.hash_sparse_attention(q, k, v, BUCKETS, key).astype("float32").sum()
        return jax.grad(attend, (0, 1, 2))(q, k, v)

    operand, key = jax.ShapeDtypeStruct((1, 512, 2, 64), "bfloat16"), jax.eval_shape(lambda: KEY)
    export_ = jax.export.export(jax.jit(gradients), platforms=["cuda"], disabled_checks=partitioning._UNCHECKED)
    with on(H100):
        exported = export_(operand, operand, operand, key)
    text = exported.mlir_module()
    assert partitioning._LONG_TO_LOWER in exported.mlir_module_serialized
    assert text.count("@mosaic_gpu") == 3  # forward, dQ, dK/dV
    assert "__gpu$xla.gpu.triton" in text


@pytest.mark.parametrize(
    ("platform", "version", "expected"),
    [("gpu", "PJRT C API\ncuda 13000", "cuda"), ("gpu", "PJRT C API\nrocm 60300", None), ("cpu", "cpu", None)],
)
def test_where_lowering_once_pays(platform, version, expected):
    device = SimpleNamespace(platform=platform, client=SimpleNamespace(platform_version=version))
    assert partitioning._long_to_lower_for(device) == expected
