"""Patterns against their definitions: the plan's dense meaning is compared, exactly, with masks written out here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparse_flash_jax as sfj
from sparse_flash_jax.flax.heads import attend, rotate
from sparse_flash_jax.flax.pattern import QK, BlockTopK, Dense, Hash, KeepScores, Window
from sparse_flash_jax.flax.shared_keys import normalise

B, T, N, K, H = 2, 37, 4, 2, 8
EARLIER = np.tril(np.ones((T, T), bool))
WINDOW = EARLIER & ~np.tril(np.ones((T, T), bool), -5)


@pytest.fixture
def heads():
    q_key, k_key = jax.random.split(jax.random.key(0))
    return jax.random.normal(q_key, (B, T, N, H)), jax.random.normal(k_key, (B, T, K, H))


@pytest.fixture
def segment_ids():
    return jnp.asarray(np.sort(np.random.default_rng(0).integers(-2, 3, (B, T)), axis=1), jnp.int32)


def same_document(segment_ids):
    return np.asarray(segment_ids)[:, None, :, None] == np.asarray(segment_ids)[:, None, None, :]


def dense(plan):
    return np.broadcast_to(np.asarray(plan.mask()), (B, N, T, T))


def per_query_head(x):
    return np.repeat(np.asarray(x).swapaxes(1, 2), N // x.shape[2], axis=1)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("window", "expected"), [(None, EARLIER), (5, WINDOW)])
def test_dense(heads, segment_ids, packed, window, expected):
    plan = Dense(window=window).plan(*heads, segment_ids=segment_ids if packed else None)
    documents = same_document(segment_ids) if packed else np.ones((1, 1, 1, 1), bool)
    np.testing.assert_array_equal(dense(plan), np.broadcast_to(documents & expected, (B, N, T, T)))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("exclude_self", [False, True])
def test_hash_grouped_heads_share_rotations(heads, segment_ids, exclude_self, packed):
    q, k = heads
    key = jax.random.key(1)
    plan = Hash(4, exclude_self=exclude_self).plan(q, k, key=key, segment_ids=segment_ids if packed else None)
    query_bucket = per_query_head(sfj.lsh_buckets(q, 4, key, num_rotations=K))
    key_bucket = per_query_head(sfj.lsh_buckets(k, 4, key))
    expected = (query_bucket[..., :, None] == key_bucket[..., None, :]) & np.tril(EARLIER, -int(exclude_self))
    np.testing.assert_array_equal(dense(plan), expected & same_document(segment_ids) if packed else expected)


def test_hash_of_shared_queries_and_keys_is_the_hash_of_normalised_ones(heads):
    q, _ = heads
    shared = Hash(8).plan(q, q, key=jax.random.key(1))
    separate = Hash(8).plan(q, normalise(q), key=jax.random.key(1))
    np.testing.assert_array_equal(np.asarray(shared.mask()), np.asarray(separate.mask()))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9])
def test_qk_keeps_exact_counts(heads, segment_ids, rate, packed):
    plan = QK(rate).plan(*heads, key=jax.random.key(2), segment_ids=segment_ids if packed else None)
    count = int(np.ceil((1 - rate) * T))
    assert plan.query_order is None or plan.query_order.shape[-1] == count
    assert int(jnp.sum(plan.overflow)) == 0
    mask = dense(plan)
    documents = same_document(segment_ids) if packed else np.ones((1, 1, 1, 1), bool)
    assert not np.any(mask & ~(EARLIER & documents))
    rows, columns = mask.any(-1), mask.any(-2)
    expected = rows[..., :, None] & columns[..., None, :] & EARLIER & documents
    np.testing.assert_array_equal(mask, expected)
    assert rows.sum(-1).max() <= count
    assert columns.sum(-1).max() <= count


def test_qk_scored_keeps_the_best(heads):
    q, k = heads
    scores = KeepScores(
        jax.random.normal(jax.random.key(3), (B, T, N)), jax.random.normal(jax.random.key(4), (B, T, K))
    )
    plan = QK(0.5, scored=True).plan(q, k, scores=scores)
    count = -(-T // 2)
    kept = [per_query_head(sfj.top_keep(score, count)) for score in scores]
    np.testing.assert_array_equal(dense(plan), kept[0][..., :, None] & kept[1][..., None, :] & EARLIER)


@pytest.mark.parametrize(
    ("pattern", "missing"), [(Hash(4), "key="), (QK(0.5), "key="), (QK(0.5, scored=True), "scores=")]
)
def test_what_is_missing_is_named(heads, pattern, missing):
    with pytest.raises(ValueError, match=missing):
        pattern.plan(*heads)


def test_buckets_that_there_cannot_be(without_shape_checks):
    for wrong in ("16", 16.0, True):
        with pytest.raises(TypeError, match="num_buckets must be a static Python int, got"):
            Hash(wrong)  # pyright: ignore[reportArgumentType]
    for wrong in (0, 7):
        with pytest.raises(ValueError, match=f"num_buckets must be .*at least 2, got {wrong}"):
            Hash(wrong)


def test_rotary_scores_depend_on_the_distance_alone(heads):
    q, _ = heads
    positions = jnp.arange(T, dtype=jnp.int32)[None]
    q, k = (x[:, :1].repeat(T, axis=1) for x in (q, q + 1.0))
    scores = jnp.einsum("btnh,bsnh->bnts", rotate(q, positions, 100.0), rotate(k, positions, 100.0))
    np.testing.assert_allclose(scores[..., 1:, 1:], scores[..., :-1, :-1], atol=1e-4)
    np.testing.assert_allclose(
        jnp.linalg.norm(rotate(q, positions, 100.0), axis=-1), jnp.linalg.norm(q, axis=-1), rtol=1e-5
    )


def test_normalising_zero_is_finite():
    gradient = jax.grad(lambda x: jnp.sum(normalise(x)))(jnp.zeros((1, 2, 1, H)))
    assert bool(jnp.all(jnp.isfinite(gradient)))


@pytest.mark.parametrize("packed", [False, True])
def test_hash_in_rounds(heads, segment_ids, packed):
    """Attention over the union of what each round shows."""
    q, k = heads
    pattern, ids = Hash(4, exclude_self=True, rounds=2), segment_ids if packed else None
    o, plan = attend(pattern, q, k, k, key=jax.random.key(1), segment_ids=ids)
    seen = np.zeros((), bool)
    for key in jax.random.split(jax.random.key(1), 2):
        query_bucket = per_query_head(sfj.lsh_buckets(q, 4, key, num_rotations=K))
        seen = seen | (query_bucket[..., :, None] == per_query_head(sfj.lsh_buckets(k, 4, key))[..., None, :])
    seen = seen & np.tril(EARLIER, -1)
    seen = seen & same_document(segment_ids) if packed else seen
    np.testing.assert_array_equal(dense(plan), seen)
    np.testing.assert_allclose(o, sfj.reference_attention(q, k, k, jnp.asarray(seen)), atol=2e-6)
    assert seen.mean() * 2 * T / (T + 1) <= plan.density()
    assert not plan.query_overflow.any()


def test_centred_hash_refuses_documents(heads, segment_ids):
    q, k = heads
    with pytest.raises(ValueError, match="centres whole rows, across documents"):
        Hash(4, centred=True).plan(q, k, key=jax.random.key(0), segment_ids=segment_ids)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("sinks", [0, 3])
def test_window(heads, segment_ids, sinks, packed):
    plan = Window(5, sinks).plan(*heads, segment_ids=segment_ids if packed else None)
    documents = same_document(segment_ids) if packed else np.ones((B, 1, T, T), bool)
    first = np.argmax(documents[:, 0], axis=2)  # ids of a document are one run here
    is_sink = (np.arange(T) - first < sinks)[:, None, None]
    np.testing.assert_array_equal(dense(plan), np.broadcast_to(documents & (WINDOW | EARLIER & is_sink), (B, N, T, T)))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("count", [1, 3, 99])
def test_block_top_k_is_that_of_the_primitive(heads, segment_ids, count, packed):
    q, k = heads
    plan = BlockTopK(8, count).plan(q, k, segment_ids=segment_ids if packed else None)
    means = [
        np.stack([np.asarray(x, np.float64)[:, at : at + 8].mean(1) for at in range(0, T, 8)], 2) for x in (q, k)
    ]  # [B N blocks H]
    scores = means[0] @ np.repeat(means[1], N // K, axis=1).swapaxes(2, 3)
    block = np.arange(scores.shape[2])
    scores = np.where(np.eye(len(block), dtype=bool), np.inf, np.where(block < block[:, None], scores, -np.inf))
    rank = np.argsort(np.argsort(-scores, axis=3), axis=3)
    chosen = np.repeat(np.repeat((rank < count) & (scores > -np.inf), 8, 2), 8, 3)[:, :, :T, :T]
    documents = same_document(segment_ids) if packed else np.ones((1, 1, 1, 1), bool)
    np.testing.assert_array_equal(dense(plan), chosen & EARLIER & documents)


def test_block_top_k_of_shared_queries_and_keys_is_that_of_normalised_ones(heads):
    q = heads[0] * jnp.exp(2 * jax.random.normal(jax.random.key(7), (B, T, 1, 1)))
    shared, separate = (BlockTopK(4, 3).plan(q, k) for k in (q, normalise(q)))
    np.testing.assert_array_equal(np.asarray(shared.mask()), np.asarray(separate.mask()))
    other = BlockTopK(4, 3).plan(q, q + 0)
    assert not np.array_equal(np.asarray(shared.mask()), np.asarray(other.mask()))


@pytest.mark.parametrize("pattern", [Window(5, 3), BlockTopK(8, 2)])
def test_attends_as_the_plan_says_with_gradients(heads, segment_ids, pattern):
    """Grouped-query heads in documents, against dense attention under the mask of the plan."""
    q, k = heads
    v, do = k[:, ::-1], q[:, ::-1]
    mask = jnp.asarray(dense(pattern.plan(q, k, segment_ids=segment_ids)))

    def by_mask(q, k, v):
        k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
        scores = jnp.where(mask, jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(H), -jnp.inf)
        return jnp.sum(do * jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v))

    by_plan = lambda q, k, v: jnp.sum(do * attend(pattern, q, k, v, segment_ids=segment_ids)[0])
    got, expected = (jax.value_and_grad(f, argnums=(0, 1, 2))(q, k, v) for f in (by_plan, by_mask))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Window(0), "window must be"),
        (lambda: Window(4, -1), "sinks must be"),
        (lambda: BlockTopK(0, 3), "block_size must be"),
        (lambda: BlockTopK(8, 0), "count must be"),
    ],
)
def test_numbers_that_there_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_sinks_and_blocks_take_one_length(heads, without_shape_checks):
    q, k = heads
    with pytest.raises(ValueError, match="as many keys as queries"):
        Window(4, 2).plan(q, k[:, :-1])
    with pytest.raises(ValueError, match="one length"):
        BlockTopK(8, 2).plan(q, k[:, :-1])
    assert Window(4).plan(q, k[:, :-1]).key_length == T - 1


@pytest.mark.parametrize("shared", [False, True])
def test_rotated_hash_goes_by_place(heads, shared):
    """Buckets are of vectors as rotary positions have turned them; shared keys hash as their queries do."""
    q, k = heads
    k = q if shared else k
    positions, key = jnp.arange(T, dtype=jnp.int32)[None] + 3, jax.random.key(1)
    call = lambda pattern: attend(pattern, q, None if shared else k, k, key=key, positions=positions, rope_base=100.0)
    o, plan = call(Hash(4, rotated=True))
    turn = lambda x: rotate(x, positions, 100.0)
    hashed = lambda x: per_query_head(sfj.lsh_buckets(turn(x), 4, key, num_rotations=k.shape[2]))
    seen = (hashed(q)[..., :, None] == hashed(k)[..., None, :]) & EARLIER
    np.testing.assert_array_equal(dense(plan), seen)
    assert (dense(call(Hash(4))[1]) != seen).any()
    of_keys = turn(normalise(q) if shared else k)
    np.testing.assert_allclose(o, sfj.reference_attention(turn(q), of_keys, k, jnp.asarray(seen)), atol=2e-6)


def test_rotated_hash_needs_rotary_positions(heads):
    q, k = heads
    with pytest.raises(ValueError, match="give it a rope_base"):
        attend(Hash(4, rotated=True), q, k, k, key=jax.random.key(0))
