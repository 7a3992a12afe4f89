"""Keep masks keep what they promise, and gates give scores the gradient that they say."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import sparse_flash_jax as sfj

LENGTH = 12
RNG = np.random.default_rng(0)


@pytest.mark.parametrize("length", [1, 7, 64])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 0.5, 0.7, 0.999, 1.0])
def test_random_keep_keeps_an_exact_count(length, rate):
    keep = sfj.random_keep(jax.random.key(0), (2, length, 3), rate)
    assert keep.shape == (2, length, 3)
    assert keep.dtype == jnp.bool_
    assert (np.sum(keep, axis=1) == math.ceil((1 - rate) * length)).all()


def test_random_keep_differs_by_head_and_key():
    keep, same, other = (np.asarray(sfj.random_keep(jax.random.key(s), (2, 64, 2), 0.5)) for s in (0, 0, 1))
    np.testing.assert_array_equal(keep, same)
    assert (keep != other).any()
    assert (keep[..., 0] != keep[..., 1]).any()
    assert (keep[0] != keep[1]).any()


def test_random_keep_is_uniform():
    keep = sfj.random_keep(jax.random.key(2), (400, 16, 4), 0.5)
    share = np.mean(keep, axis=(0, 2))
    # 1600 draws: six standard deviations of 1/80.
    np.testing.assert_allclose(share, 0.5, atol=0.075)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("count", [0, 1, 5, LENGTH])
def test_top_keep_keeps_the_best(dtype, count):
    scores = jnp.asarray(RNG.integers(-3, 4, (2, LENGTH, 3)), dtype)
    keep = np.asarray(sfj.top_keep(scores, count))
    for index in np.ndindex(2, 3):
        column = np.asarray(scores, np.float64)[index[0], :, index[1]]
        best = sorted(range(LENGTH), key=lambda t: (-column[t], t))[:count]
        assert sorted(np.flatnonzero(keep[index[0], :, index[1]])) == sorted(best)


def test_top_keep_takes_nan_for_the_lowest():
    scores = jnp.array([jnp.nan, 1.0, -jnp.inf, jnp.inf, jnp.nan])[None, :, None]
    np.testing.assert_array_equal(sfj.top_keep(scores, 2)[0, :, 0], [False, True, False, True, False])
    assert np.sum(sfj.top_keep(scores, 4)) == 4


def test_counts_are_exact_capacities():
    keep = sfj.random_keep(jax.random.key(0), (2, 50, 3), 0.3)
    count = math.ceil(0.7 * 50)
    plan = sfj.qk_sparse(keep, keep, query_capacity=count, key_capacity=count)
    assert plan.runs.k_start.shape[-1] == plan.runs.q_start.shape[-1] == count
    assert not plan.overflow.any()


RATES = (0.3, 0.0, 0.999, 1.0)


def test_each_head_has_a_rate_of_its_own():
    keep = np.asarray(sfj.random_keep(jax.random.key(0), (2, 64, 4), RATES))
    np.testing.assert_array_equal(keep.sum(axis=1), [[math.ceil((1 - rate) * 64) for rate in RATES]] * 2)
    for head, rate in enumerate(RATES):
        np.testing.assert_array_equal(keep[..., head], sfj.random_keep(jax.random.key(0), (2, 64, 4), rate)[..., head])


def test_each_head_has_a_count_of_its_own():
    scores, counts = jnp.asarray(RNG.integers(-3, 4, (2, LENGTH, 4)), jnp.float32), (0, 5, LENGTH, 1)
    keep = sfj.top_keep(scores, counts)
    for head, count in enumerate(counts):
        np.testing.assert_array_equal(keep[..., head], sfj.top_keep(scores, count)[..., head])


X, DO = (jnp.asarray(RNG.standard_normal((2, LENGTH, 4, 8)), jnp.float32) for _ in range(2))
SCORES = jnp.asarray(3 * RNG.standard_normal((2, LENGTH, 4)), jnp.float32)


def plain(x, scores, gradient):
    """The three gates as their formulas have them."""
    gate = jax.nn.sigmoid(scores)[..., None]
    match gradient:
        case "scaled":
            return x * gate
        case "straight_through":
            return x * (1.0 + (gate - jax.lax.stop_gradient(gate)))
    return x


@pytest.mark.parametrize("gradient", ["scaled", "straight_through", "none"])
def test_gates_and_their_gradients(gradient):
    gated, vjp = jax.vjp(lambda x, scores: sfj.score_gate(x, scores, gradient), X, SCORES)
    expected, expected_vjp = jax.vjp(lambda x, scores: plain(x, scores, gradient), X, SCORES)
    np.testing.assert_allclose(gated, expected, rtol=1e-6)
    for ours, theirs in zip(vjp(DO), expected_vjp(DO), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert bool(jnp.any(vjp(DO)[1] != 0)) == (gradient != "none")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_straight_through_leaves_every_bit(dtype):
    x = X.astype(dtype).at[0, 0, 0, :5].set(jnp.asarray([-0.0, np.inf, -np.inf, 1e-30, 3e38], dtype))
    scores = SCORES.astype(dtype).at[0, 1, 1].set(np.nan)
    bits = f"uint{8 * x.dtype.itemsize}"
    gated = jax.jit(lambda x, scores: sfj.score_gate(x, scores, "straight_through"))(x, scores)
    np.testing.assert_array_equal(jax.lax.bitcast_convert_type(gated, bits), jax.lax.bitcast_convert_type(x, bits))


def test_gradients_of_bfloat16_are_summed_in_float32():
    x, do, scores = (y.astype(jnp.bfloat16) for y in (X, DO, SCORES))
    ours = jax.vjp(sfj.score_gate, x, scores)[1](do)
    exact = jax.vjp(lambda x, s: plain(x, s, "scaled"), *(y.astype(jnp.float32) for y in (x, scores)))[1](
        do.astype(jnp.float32)
    )
    for y, expected in zip(ours, exact, strict=True):
        assert y.dtype == jnp.bfloat16
        np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=2**-8)  # rounded once


def test_gates_where_scores_are_alike_on_all_devices():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    rows, whole = PartitionSpec("data"), PartitionSpec()
    scores = SCORES[:1]

    def gradients(x, scores):
        return jax.grad(lambda x, scores: jax.lax.psum(jnp.sum(sfj.score_gate(x, scores) ** 2), "data"), (0, 1))(
            x, scores
        )

    over_devices = jax.shard_map(gradients, mesh=mesh, in_specs=(rows, whole), out_specs=(rows, whole))
    expected = jax.grad(
        lambda x, scores: jnp.sum(plain(x, jnp.broadcast_to(scores, SCORES.shape), "scaled") ** 2), (0, 1)
    )(X, scores)
    for ours, theirs in zip(over_devices(X, scores), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: sfj.random_keep(jax.random.key(0), (2, 6, 4), (0.5, 0.1)),
            "rate must be one .* each of 4 heads, got 2",
        ),
        (lambda: sfj.random_keep(jax.random.key(0), (2, 6, 2), (0.5, 1.1)), r"rate must be in \[0, 1\], .* got 1.1"),
        (lambda: sfj.top_keep(SCORES, (1, 2, 3)), "count must be one .* each of 4 heads, got 3"),
        (lambda: sfj.top_keep(SCORES, (1, 2, 3, 13)), "count must be at most the length T=12, got 13"),
        (
            lambda: sfj.score_gate(X, SCORES, "soft"),  # pyright: ignore[reportArgumentType]
            "gradient of scores must be one of .* got 'soft'",
        ),
        (lambda: sfj.score_gate(X, SCORES[:, 1:]), r"scores must have the shape \(2, 12, 4\) of x .* got \(2, 11, 4\)"),
    ],
)
def test_wrong_calls(call, message, without_shape_checks):
    with pytest.raises(ValueError, match=message):
        call()
