"""The best are those that two sorts find, whatever the numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

import sparse_flash_jax as sfj
from sparse_flash_jax.selection import best
from tests.gpus import lowered

DTYPES = ["float32", "float16", "bfloat16"]
SPECIAL = [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0, 65504.0, -65504.0, 1e-4, -1e-4, 3.0, np.pi]


def by_sorting(scores, count):
    """As counted from the best; ties to the earlier, NaN as -inf. [B N T]"""
    scores = np.asarray(scores.astype(jnp.float32))
    descending = np.where(np.isnan(scores), np.inf, -scores)
    order = np.argsort(descending, axis=-1, kind="stable")
    return np.argsort(order, axis=-1) < count


def assert_best(scores, counts):
    for count in counts:
        np.testing.assert_array_equal(best(scores, count), by_sorting(scores, count), f"the best {count}")


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(0, 33), of=st.integers(1, len(SPECIAL)))
def test_special_numbers(dtype, seed, count, of):
    """Few of them, so that many are equal."""
    rng = np.random.default_rng(seed)
    scores = rng.choice(rng.permutation(SPECIAL)[:of], (2, 3, 33))
    assert_best(jnp.asarray(scores, dtype), [count])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 15, 16, 300])
def test_any_count(dtype, length):
    scores = jnp.asarray(np.random.default_rng(length).standard_normal((1, 2, length)), dtype)
    assert_best(scores, {0, 1, length // 3, length - 1, length})


@pytest.mark.parametrize("number", [0.0, -0.0, 1.0, np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_equal(dtype, number):
    np.testing.assert_array_equal(best(jnp.full((1, 1, 40), number, dtype), 17)[0, 0], np.arange(40) < 17)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_number_of_16_bits(dtype):
    bits = np.random.default_rng(0).permutation(2**16).astype(np.uint16)
    scores = jax.lax.bitcast_convert_type(jnp.asarray(bits), dtype)
    # What flushes to 0 is equal to it there, and here it is not.
    scores = jnp.where(jnp.abs(scores) < jnp.finfo(dtype).tiny, jnp.zeros_like(scores), scores)
    assert_best(scores[None, None], [1, 1000, 30_000, 50_000, 65_535])


def test_numbers_next_to_each_other():
    start = np.float32(0.3)
    steps = np.random.default_rng(0).permutation(64).astype(np.int32)
    scores = jnp.asarray((start.view(np.int32) + steps).view(np.float32))[None, None]
    assert_best(scores, range(65))
    assert_best(-scores, range(65))


def test_the_draw_of_random_keep():
    """Which tokens a key keeps stays as it is: the best of uniform numbers."""
    keep = sfj.random_keep(jax.random.key(3), (2, 100, 3), 0.37)
    uniform = jax.random.uniform(jax.random.key(3), (2, 100, 3), jnp.float32).swapaxes(1, 2)
    np.testing.assert_array_equal(keep.swapaxes(1, 2), by_sorting(uniform, 63))


def test_no_gradient():
    scores = jnp.asarray(np.random.default_rng(0).standard_normal((1, 20, 2)), jnp.float32)
    kept, gradient = jax.value_and_grad(lambda x: jnp.sum(jnp.where(sfj.top_keep(x, 7), x, 0)))(scores)
    np.testing.assert_array_equal(gradient, sfj.top_keep(scores, 7))
    assert np.isfinite(kept)


def test_vmap():
    scores = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 20, 2)), jnp.float32)
    choose = functools.partial(sfj.top_keep, count=7)
    np.testing.assert_array_equal(jax.vmap(choose)(scores), jnp.stack([choose(x) for x in scores]))


def test_shard_map():
    """On this machine's devices, over batch entries."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("data")
    scores = jnp.asarray(np.random.default_rng(0).standard_normal((jax.device_count(), 20, 2)), jnp.float32)
    choose = functools.partial(sfj.top_keep, count=7)
    over_devices = jax.jit(jax.shard_map(choose, mesh=mesh, in_specs=spec, out_specs=spec))
    np.testing.assert_array_equal(over_devices(scores), choose(scores))


def test_nothing_is_sorted():
    scores = jax.ShapeDtypeStruct((2, 1000, 3), jnp.float32)
    assert "stablehlo.sort" not in lowered(functools.partial(sfj.top_keep, count=300), scores)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu(dtype):
    scores = jnp.asarray(np.random.default_rng(0).standard_normal((2, 12, 16_384)), dtype)
    assert_best(scores, [0, 1, 8192, 16_384])
