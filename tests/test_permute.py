"""Gather and restore: inverses of one another, and each the other's gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_flash_jax.permute import Permutation, gather, restore
from tests.jaxprs import primitives

LENGTH, HEAD_DIM = 11, 3
SCATTERS = {"scatter", "scatter-add", "scatter_add", "scatter-mul", "scatter_mul"}


def permutation(slots, batch=2, heads=4, length=LENGTH):
    """Random permutations cut to some slots."""
    rng = np.random.default_rng(slots)
    order = np.argsort(rng.random((batch, heads, length)), axis=-1)
    slot = np.minimum(np.argsort(order, axis=-1), slots)
    return Permutation(jnp.asarray(order[..., :slots], jnp.int32), jnp.asarray(slot, jnp.int32))


def rows(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("axes", [(2, 4), (1, 4), (2, 1), (1, 1)])
@pytest.mark.parametrize("slots", [1, 6, LENGTH])
def test_round_trip(slots, axes):
    by = permutation(slots, *axes)
    x = rows((2, LENGTH, 4, HEAD_DIM))
    sorted_rows = gather(x, by)
    full = np.broadcast_to(by.order, (2, 4, slots))
    expected = np.take_along_axis(np.asarray(x).swapaxes(1, 2), full[..., None], axis=2)
    np.testing.assert_array_equal(sorted_rows, expected)
    has_slot = np.broadcast_to(by.slot < slots, (2, 4, LENGTH)).swapaxes(1, 2)
    np.testing.assert_array_equal(restore(sorted_rows, by), np.where(has_slot[..., None], x, 0))


@pytest.mark.parametrize("slots", [6, LENGTH])
def test_each_is_the_others_gradient(slots):
    by = permutation(slots)
    x, y = rows((2, LENGTH, 4, HEAD_DIM)), rows((2, 4, slots, HEAD_DIM), seed=1)
    _, gathered = jax.vjp(lambda x: gather(x, by), x)
    np.testing.assert_array_equal(gathered(y)[0], restore(y, by))
    _, restored = jax.vjp(lambda y: restore(y, by), y)
    np.testing.assert_array_equal(restored(x)[0], gather(x, by))
    # <gather(x), y> = <x, restore(y)>, the definition of a transpose.
    np.testing.assert_allclose(jnp.vdot(gather(x, by), y), jnp.vdot(x, restore(y, by)), rtol=1e-5)


@pytest.mark.parametrize("slots", [6, LENGTH])
def test_nothing_is_scattered(slots):
    by = permutation(slots)

    def there_and_back(x):
        return jnp.sum(restore(jnp.sin(gather(x, by)), by) ** 2)

    found = set(primitives(jax.make_jaxpr(jax.value_and_grad(there_and_back))(rows((2, LENGTH, 4, HEAD_DIM)))))
    assert "gather" in found
    assert not found & SCATTERS


def test_slots_that_are_positions_move_nothing():
    x = rows((2, LENGTH, 4, HEAD_DIM))
    np.testing.assert_array_equal(gather(x, None), x.swapaxes(1, 2))
    np.testing.assert_array_equal(restore(x.swapaxes(1, 2), None), x)
    assert set(primitives(jax.make_jaxpr(lambda x: gather(x, None))(x))) == {"transpose"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype_stays(dtype):
    by = permutation(6)
    x = rows((2, LENGTH, 4, HEAD_DIM)).astype(dtype)
    assert gather(x, by).dtype == dtype
    assert restore(gather(x, by), by).dtype == dtype


def test_a_row_without_a_slot_stays_out():
    """NaN in a dropped row reaches nothing, forward or backward."""
    by = permutation(6)
    dropped = (by.slot == 6).swapaxes(1, 2)[..., None]
    x = jnp.where(dropped, jnp.nan, rows((2, LENGTH, 4, HEAD_DIM)))
    assert np.isfinite(gather(x, by)).all()
    _, vjp = jax.vjp(lambda y: restore(y, by), gather(x, by))
    assert np.isfinite(vjp(x)[0]).all()
