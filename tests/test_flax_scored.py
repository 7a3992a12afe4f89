"""Dropping by learned scores, and by rates of the heads: as dense attention with the same gates, and it learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparse_flash_jax as sfj
from sparse_flash_jax.flax.adapter import attention_fn
from sparse_flash_jax.flax.auto import Auto
from sparse_flash_jax.flax.heads import attend
from sparse_flash_jax.flax.pattern import QK, KeepScores

B, T, N, K, H = 2, 19, 4, 2, 8
KEYS = jax.random.split(jax.random.key(0), 6)
Q, DO = (jax.random.normal(key, (B, T, N, H)) for key in KEYS[:2])
KEY_ROWS, V = (jax.random.normal(key, (B, T, K, H)) for key in KEYS[2:4])
SCORES = KeepScores(jax.random.normal(KEYS[4], (B, T, N)), jax.random.normal(KEYS[5], (B, T, K)))
RATES = (0.7, 0.4, 0.5, 0.9)
COUNTS, KEY_COUNTS = (6, 12, 10, 2), (12, 10)  # ceil((1 - rate) * 19), and the most of each two
GRADIENTS = pytest.mark.parametrize("gradient", ["scaled", "straight_through", "none"])


def attended(pattern, q, k, v, scores):
    return attend(pattern, q, k, v, scores=scores)[0]


def by_definition(gradient, q, k, v, scores):
    """Dense attention in float32 under the mask of what is kept, with gates as their formulas have them."""
    kept = [
        jnp.stack([sfj.top_keep(side, count)[..., head] for head, count in enumerate(counts)], axis=-1).swapaxes(1, 2)
        for side, counts in zip(scores, (COUNTS, KEY_COUNTS), strict=True)
    ]
    mask = kept[0][..., :, None] & jnp.repeat(kept[1], N // K, axis=1)[..., None, :]
    gates = [jax.nn.sigmoid(side)[..., None] for side in scores]
    if gradient == "straight_through":
        gates = [1 + (gate - jax.lax.stop_gradient(gate)) for gate in gates]
    query_gate, key_gate = [jnp.ones_like(gate) for gate in gates] if gradient == "none" else gates
    mask &= jnp.tril(jnp.ones((T, T), bool))[None, None]
    return query_gate * sfj.reference_attention(q, k, key_gate * v, mask), kept


@GRADIENTS
def test_dense_attention_with_the_same_gates(gradient):
    pattern = QK(RATES, scored=True, score_gradient=gradient)
    operands = Q, KEY_ROWS, V, SCORES
    ours, vjp = jax.vjp(functools.partial(attended, pattern), *operands)
    theirs, their_vjp, kept = jax.vjp(functools.partial(by_definition, gradient), *operands, has_aux=True)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    gradients = vjp(DO)
    for x, expected in zip(jax.tree.leaves(gradients), jax.tree.leaves(their_vjp(DO)), strict=True):
        np.testing.assert_allclose(x, expected, atol=1e-5)
    for of_side, keep in zip(gradients[-1], kept, strict=True):
        assert not np.any(np.asarray(of_side)[~np.asarray(keep.swapaxes(1, 2))])
        assert bool(jnp.any(of_side != 0)) == (gradient != "none")


def test_straight_through_computes_what_plain_dropping_does():
    kept = [sfj.top_keep(side, counts) for side, counts in zip(SCORES, (COUNTS, KEY_COUNTS), strict=True)]
    capacities = {"query_capacity": max(COUNTS), "key_capacity": max(COUNTS)}
    plain = sfj.qk_sparse_attention(Q, KEY_ROWS, V, *kept, **capacities)
    through = attended(QK(RATES, scored=True, score_gradient="straight_through"), Q, KEY_ROWS, V, SCORES)
    np.testing.assert_array_equal(through, plain)
    np.testing.assert_array_equal(through[~np.asarray(kept[0])], 0.0)


@pytest.mark.parametrize("scored", [False, True])
def test_each_head_keeps_its_own_number(scored):
    pattern = QK(RATES, scored=scored)
    query_keep, key_keep = pattern.keep(Q, KEY_ROWS, KEYS[0], SCORES)
    np.testing.assert_array_equal(np.sum(query_keep, axis=1), [COUNTS] * B)
    np.testing.assert_array_equal(np.sum(key_keep, axis=1), [KEY_COUNTS] * B)
    plan = pattern.plan(Q, KEY_ROWS, key=KEYS[0], scores=SCORES)
    assert plan.runs.k_start.shape[-1] == plan.runs.q_start.shape[-1] == pattern.kept(T) == max(COUNTS)
    assert not plan.overflow.any()
    expected = query_keep.swapaxes(1, 2)[..., None] & np.repeat(key_keep.swapaxes(1, 2), N // K, 1)[:, :, None]
    np.testing.assert_array_equal(plan.mask(), np.asarray(expected) & np.tril(np.ones((T, T), bool)))


def test_equal_rates_are_one_rate():
    for one, each in ((0.3, (0.3,) * N), (0.0, (0.0,) * N)):
        for x, y in zip(
            QK(one).keep(Q, KEY_ROWS, KEYS[0], None), QK(each).keep(Q, KEY_ROWS, KEYS[0], None), strict=True
        ):
            np.testing.assert_array_equal(x, y)
    assert Auto(QK((0.5, 0.0))).expected_density == pytest.approx(0.625)


MARKED, LENGTH = 6, 24


def marked(key):
    """Tokens of noise, of which MARKED point along a direction: these output the mean payload of those so far."""
    keys = jax.random.split(key, 3)
    is_marked = sfj.random_keep(keys[0], (8, LENGTH, 1), 1 - MARKED / LENGTH)[..., 0]
    features = jax.random.normal(keys[1], (8, LENGTH, 6)).at[..., 0].set(jnp.where(is_marked, 1.0, -1.0))
    payload = jax.random.normal(keys[2], (8, LENGTH, 1, 4))
    weight = is_marked[..., None, None].astype(jnp.float32)
    mean = jnp.cumsum(weight * payload, axis=1) / jnp.maximum(jnp.cumsum(weight, axis=1), 1.0)
    return features, payload, weight * mean


def loss_of(pattern, weights, batch, key=None):
    features, payload, target = batch
    scores = KeepScores(features @ weights.query, features @ weights.key) if pattern.scored else None
    same = jnp.zeros_like(payload)  # all keys weigh alike
    o, _ = attend(pattern, same, same, payload, key=key, scores=scores)
    return jnp.mean(jnp.sum((o - target) ** 2, axis=(2, 3)))


@GRADIENTS
def test_scores_learn_what_to_keep(gradient):
    rate = 1 - MARKED / LENGTH
    pattern = QK(rate, scored=True, score_gradient=gradient)
    weights = KeepScores(*(0.5 * jax.random.normal(key, (6, 1)) for key in KEYS[:2]))

    def learn(weights, key):
        gradient = jax.grad(functools.partial(loss_of, pattern))(weights, marked(key))
        return jax.tree.map(lambda x, dx: x - 2.0 * dx, weights, gradient), None

    learned = jax.jit(lambda weights: jax.lax.scan(learn, weights, jax.random.split(KEYS[2], 100))[0])(weights)
    unseen = marked(KEYS[3])
    by_chance = loss_of(QK(rate), learned, unseen, KEYS[4])
    before, after = (loss_of(pattern, each, unseen) for each in (weights, learned))
    if gradient == "none":
        assert after == before
    else:
        assert after < 0.1 * by_chance
        assert after < 0.1 * before


def test_wrong_rates(without_shape_checks):
    for wrong, error, message in (
        ([0.3], TypeError, r"rate must be a number, or a tuple .*got \[0.3\]"),
        ((), ValueError, "got an empty one"),
        ((0.5, 1.0), ValueError, r"rate must be in \[0, 1\), .* got 1.0"),
    ):
        with pytest.raises(error, match=message):
            QK(wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"must be one of .*'straight_through'.*, got 'soft'"):
        QK(0.5, scored=True, score_gradient="soft")  # pyright: ignore[reportArgumentType]
    for scored in (False, True):
        with pytest.raises(ValueError, match="rate must be one number, or one for each of 4 heads, got 3"):
            attend(QK((0.1, 0.2, 0.3), scored=scored), Q, KEY_ROWS, V, key=KEYS[0], scores=SCORES)
    with pytest.raises(ValueError, match="each of 4 heads, got 1"):
        attention_fn(QK((0.1,)), key=KEYS[0])(Q, Q, Q)
    with pytest.raises(ValueError, match="key heads must divide query heads"):
        QK(RATES).side_rates(4, 3)
