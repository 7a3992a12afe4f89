"""The kernel that hashes puts vectors where `lsh_buckets` does, but for ties; and it lowers for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import sparse_flash_jax as sfj
from sparse_flash_jax.flax.pattern import Hash
from sparse_flash_jax.hashing import draw_rotation, hash_sides
from sparse_flash_jax.kernels.triton.hashing import ROWS, hash_rows
from tests.gpus import GPUS, H100, lowered, mesh_of, on, put_device, put_interpreted

KEY = jax.random.key(5)
# Shape of x, rotations, buckets.
SHAPES = {
    "one_token": ((1, 1, 1, 64), 1, 16),
    "whole_chunks": ((1, 2 * ROWS, 2, 64), 2, 16),
    "part_of_a_chunk": ((2, ROWS + 37, 2, 64), 2, 32),
    "gqa": ((2, 150, 6, 32), 2, 16),
    "two_buckets": ((1, 300, 2, 64), 2, 2),
    "no_power_of_two": ((1, 300, 2, 48), 1, 22),
    "head_dim_8": ((1, 300, 2, 8), 2, 16),
    "head_dim_80": ((1, 300, 2, 80), 2, 64),
    "head_dim_96": ((1, 300, 2, 96), 2, 100),
    "head_dim_256": ((1, 300, 2, 256), 2, 16),
    "most_buckets": ((1, 500, 2, 64), 2, 256),
}


def vectors(shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(shape[1]).standard_normal(shape), dtype)


def assert_buckets(bucket, x, num_buckets, key=KEY, num_rotations=None, centred=False):
    """Each vector's bucket is that of the direction farthest along it, or as far along it within rounding.

    A sum of H products errs by at most H 2^-24 |x| in float32, as columns are of length 1; by twice that on tensor
    cores, which truncate. So the chosen and the best projection may swap within twice as much again. A mean of t
    vectors adds as much of their mean length, and as t is summed up, t 2^-24 of it.
    """
    assert bucket.shape == x.shape[:3]
    assert bucket.dtype == jnp.int32
    rotation = np.asarray(draw_rotation(x, num_buckets, key, num_rotations), np.float64)
    rotation = np.repeat(rotation, x.shape[2] // rotation.shape[0], axis=0)
    x = np.asarray(x.astype(jnp.float32), np.float64)
    projected = np.einsum("btnh,nhr->btnr", x, rotation)
    scale = x.shape[-1] * np.linalg.norm(x, axis=-1)
    if centred:
        count = np.arange(1, x.shape[1] + 1)[None, :, None]
        projected -= np.cumsum(projected, axis=1) / count[..., None]
        scale += (x.shape[-1] + count) * np.cumsum(np.linalg.norm(x, axis=-1), axis=1) / count
    projected = np.concatenate([projected, -projected], axis=-1)
    assert ((bucket >= 0) & (bucket < num_buckets)).all()
    chosen = np.take_along_axis(projected, np.asarray(bucket)[..., None], axis=-1)[..., 0]
    margin = projected.max(axis=-1) - chosen
    bound = 4 * 2.0**-24 * scale
    assert (margin <= bound).all(), f"{np.sum(margin > bound)} of {margin.size} are no ties"


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_equal_but_for_ties(name, centred):
    shape, num_rotations, num_buckets = SHAPES[name]
    x = vectors(shape) + 2 * centred
    bucket = hash_rows(x, draw_rotation(x, num_buckets, KEY, num_rotations), centred=centred, interpret=True)
    assert_buckets(bucket, x, num_buckets, num_rotations=num_rotations, centred=centred)


@pytest.mark.parametrize("number", [1e30, np.inf, np.nan])
def test_later_vectors_do_not_matter_to_centred_ones(number):
    x, rotation = vectors((1, 2 * ROWS, 2, 16)), draw_rotation(vectors((1, 1, 2, 16)), 8, KEY, None)
    bucket = hash_rows(x, rotation, centred=True, interpret=True)
    for first in (5, ROWS - 1, ROWS, ROWS + 5):
        changed = hash_rows(x.at[:, first:].set(number), rotation, centred=True, interpret=True)
        np.testing.assert_array_equal(changed[:, :first], bucket[:, :first])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_in_16_bits(dtype):
    x = vectors((1, 400, 3, 64), dtype)
    bucket = hash_rows(x, draw_rotation(x, 64, KEY, None), interpret=True)
    assert_buckets(bucket, x, 64)


def test_rounded_rotations_would_be_seen():
    """That is, the bound is not too wide to tell float32 from bfloat16."""
    x = vectors((1, 2000, 2, 64))
    rounded = draw_rotation(x, 64, KEY, None).astype(jnp.bfloat16).astype(jnp.float32)
    with pytest.raises(AssertionError, match="are no ties"):
        assert_buckets(hash_rows(x, rounded, interpret=True), x, 64)


@pytest.mark.parametrize("number", [0.0, np.nan])
def test_vectors_without_direction(number):
    x = jnp.full((1, 5, 1, 8), number)
    bucket = hash_rows(x, draw_rotation(x, 6, KEY, None), interpret=True)
    np.testing.assert_array_equal(bucket, sfj.lsh_buckets(x, 6, KEY))


def test_opposite_vectors_and_equal_projections():
    """Of equal projections the first wins, and a direction before all opposites, as in argmax."""
    x = jnp.asarray([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])[None, :, None]
    np.testing.assert_array_equal(hash_rows(x, jnp.eye(2)[None], interpret=True)[0, :, 0], [0, 1, 0, 2])


@pytest.fixture
def hashed(monkeypatch):
    """Hashes as with a GPU, whose kernel is interpreted; the shapes that it hashed."""
    return put_interpreted(monkeypatch, "sparse_flash_jax.hashing.hashing_kernel", hash_rows)


def test_both_sides_by_the_rotations_of_the_keys(hashed):
    q, k = vectors((2, 70, 4, 16)), vectors((2, 50, 2, 16))
    query_bucket, key_bucket = hash_sides(q, k, 8, KEY, centred=False)
    assert_buckets(query_bucket, q, 8, num_rotations=2)
    assert_buckets(key_bucket, k, 8)
    assert hashed == [q.shape, k.shape]


def test_shared_queries_and_keys_are_hashed_once(hashed):
    q = vectors((1, 70, 2, 16))
    query_bucket, key_bucket = hash_sides(q, q, 8, KEY, centred=False)
    assert query_bucket is key_bucket
    assert hashed == [q.shape]


def test_layers_and_calls_hash_by_the_kernel(hashed):
    sides = [(vectors((1, length, 2, 16)), vectors((1, length - 10, 2, 16))) for length in (70, 90)]
    (q, k), of_layer = sides  # of other lengths: what is traced once is not traced again
    sfj.hash_sparse_attention(q, k, k, 8, KEY)
    Hash(8).plan(*of_layer, key=KEY)
    assert hashed == [x.shape for side in sides for x in side]


@pytest.mark.usefixtures("hashed")
def test_no_gradient():
    x = vectors((1, 40, 2, 16))
    weighted = lambda x: jnp.sum(hash_sides(x, x, 8, KEY, centred=False)[0].astype(jnp.float32) * x[..., 0])
    gradient = jax.grad(weighted)(x)
    assert not gradient[..., 1:].any()
    np.testing.assert_array_equal(gradient[..., 0], hash_sides(x, x, 8, KEY, centred=False)[0].astype(jnp.float32))


@pytest.mark.usefixtures("hashed")
def test_vmap():
    x = vectors((3, 150, 2, 16))
    bucket = jax.vmap(lambda x: hash_sides(x[None], x[None], 8, KEY, centred=False)[0][0])(x)
    assert_buckets(bucket, x, 8)


def test_a_gpus_host_hashes_on_its_cpu(monkeypatch):
    put_device(monkeypatch)
    x = vectors((1, 40, 2, 16))
    hashes = jax.jit(lambda x: hash_sides(x, x, 8, KEY, centred=False)[0])
    np.testing.assert_array_equal(hashes(x), sfj.lsh_buckets(x, 8, KEY))
    with on(H100):
        assert "__gpu$xla.gpu.triton" in lowered(hashes, x)


def test_lowers_for_cuda_under_shard_map(monkeypatch):
    put_device(monkeypatch)
    mesh, spec = mesh_of(H100), PartitionSpec("data")
    x = jnp.zeros((jax.device_count(), 300, 2, 64))
    call = jax.shard_map(lambda x: hash_sides(x, x, 8, KEY, centred=False)[0], mesh=mesh, in_specs=spec, out_specs=spec)
    with on(H100):
        assert "__gpu$xla.gpu.triton" in lowered(call, x)


@pytest.mark.parametrize("kind", GPUS)
@pytest.mark.parametrize(
    ("dtype", "head_dim", "directions"), [("bfloat16", 64, 8), ("float16", 80, 1), ("float32", 256, 128)]
)
def test_lowers_for_cuda(kind, dtype, head_dim, directions):
    x = jax.ShapeDtypeStruct((2, 1000, 4, head_dim), dtype)
    rotation = jax.ShapeDtypeStruct((2, head_dim, directions), "float32")
    with on(kind):
        for centred in (False, True):
            text = lowered(functools.partial(hash_rows, centred=centred), x, rotation)
            assert text.count("__gpu$xla.gpu.triton") == 1
        assert lowered(jax.vmap(hash_rows, (0, None)), jax.ShapeDtypeStruct((3, *x.shape), dtype), rotation)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("shape", "num_rotations", "num_buckets"),
    [*SHAPES.values(), ((2, 16_384, 12, 64), 12, 16), ((1, 9999, 3, 128), 3, 64)],
)
@pytest.mark.parametrize("centred", [False, True])
def test_hashed_on_a_gpu(shape, num_rotations, num_buckets, dtype, centred):
    x = vectors(shape, dtype) + 2 * centred
    rotation = draw_rotation(x, num_buckets, KEY, num_rotations)
    bucket = jax.jit(hash_rows, static_argnames="centred")(x, rotation, centred=centred)
    assert_buckets(bucket, x, num_buckets, num_rotations=num_rotations, centred=centred)


@pytest.mark.gpu
def test_many_more_buckets_on_a_gpu():
    x = vectors((1, 300, 2, 64))
    assert_buckets(sfj.lsh_buckets(x, 1024, KEY), x, 1024)


def test_named_xla_uses_no_kernel(monkeypatch):
    put_device(monkeypatch)
    q = jax.ShapeDtypeStruct((1, 300, 2, 64), jnp.bfloat16)
    keep = jax.ShapeDtypeStruct((1, 300, 2), bool)

    def whole(q, keep, implementation):
        hashed = sfj.hash_sparse_attention(q, q, q, 8, KEY, implementation=implementation)
        return hashed + sfj.qk_sparse_attention(q, q, q, keep, keep, implementation=implementation)

    for implementation, kernels in (("xla", False), (None, True)):
        with on(H100):
            text = lowered(functools.partial(whole, implementation=implementation), q, keep)
        assert ("__gpu$xla.gpu.triton" in text) == kernels
    with pytest.raises(ValueError, match="implementation must be None or one of"):
        sfj.lsh_buckets(vectors((1, 8, 1, 4)), 2, KEY, implementation="cuda")
