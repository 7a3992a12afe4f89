"""What benchmarks/coverage.py counts, against masks and weights that numpy makes."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

LENGTH, HEADS, BUCKETS, CHUNK, ROUNDS = 90, 2, 4, 8, 3


@pytest.fixture(scope="module")
def counts(benchmark_module):
    return benchmark_module("coverage_counts")


def shown_by(bucket, chunk):
    """Of one head and round, [T T]: pairs of the same bucket with an earlier token, and those of them in two chunks."""
    length = len(bucket)
    earlier = np.tril(np.ones((length, length), bool), -1)
    same = (bucket[:, None] == bucket[None]) & earlier
    slot = np.empty(length, int)
    slot[np.argsort(bucket, kind="stable")] = np.arange(length)
    back = slot[:, None] // chunk - slot[None] // chunk
    return same, same & (back <= 1)


@pytest.fixture
def case(counts, monkeypatch):
    """Vectors, rounds of hashes, and what each scheme then shows after each of them, [R schemes N T T]."""
    monkeypatch.setattr(counts, "BLOCK", 32)
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((1, LENGTH, HEADS, 8)), jnp.float32)
    vectors = counts.Vectors(q, q, jnp.asarray(rng.standard_normal(q.shape), jnp.float32), scale=0.5)
    rounds, plans = counts.hashed_rounds(vectors, BUCKETS, CHUNK, ROUNDS, seed=0)
    assert len(plans) == ROUNDS
    assert len({np.asarray(ids).tobytes() for ids in rounds.reformer.bucket}) == ROUNDS
    by_round = np.array(
        [[shown_by(ids, CHUNK) for ids in np.asarray(heads)] for heads in rounds.reformer.bucket]
    )  # [R N 2 T T]
    same, chunked = np.moveaxis(np.logical_or.accumulate(by_round), 2, 0)
    return vectors, rounds, np.stack([same, same, chunked], axis=1)


def test_pairs_are_those_of_the_masks(counts, case):
    _, rounds, masks = case
    found = counts.count_pairs(rounds, (1, 3))
    expected = [dict(zip(counts.SCHEMES, masks[after - 1].sum(axis=(1, 2, 3)), strict=True)) for after in (1, 3)]
    assert found == expected
    assert found[0]["reformer"] < found[0]["ours"] < found[1]["ours"]


def test_a_shorter_plan_covers_less(counts, case):
    _, rounds, _ = case
    found = counts.count_pairs(rounds._replace(stop=rounds.stop - 1), (1,))
    assert found[0]["ours"] < found[0]["same_bucket"]
    with pytest.raises(AssertionError, match="a pair of two buckets is shown"):
        counts.count_pairs(rounds._replace(start=rounds.start - 1), (1,))


def test_weights_are_those_of_dense_attention(counts, case):
    vectors, rounds, masks = case
    found = counts.weigh_pairs(rounds, vectors, (2,), samples=16, seed=5)[0]
    queries = np.random.default_rng(5).integers(counts.TOP, LENGTH, 16)
    q, k = (np.asarray(x[0], np.float64) for x in (vectors.q, vectors.k))
    top, mass = [], []
    for query in queries:
        for head in range(HEADS):
            weights = np.exp(vectors.scale * k[:query, head] @ q[query, head])
            weights /= weights.sum()
            largest = np.argsort(-weights)[: counts.TOP]
            seen = masks[1, :, head, query, :query]
            top.append(seen[:, largest].mean(axis=1))
            mass.append(seen @ weights)
    for name, expected in (("top", top), ("mass", mass)):
        wanted = dict(zip(counts.SCHEMES, np.mean(expected, axis=0), strict=True))
        assert found[name] == pytest.approx(wanted, abs=1e-6)


def test_drawn_vectors_go_on_as_they_begin(counts):
    vectors = importlib.import_module("coverage_vectors")
    for kind in vectors.KINDS:
        short, long = (vectors.drawn(kind, length, 2) for length in (20, 50))
        np.testing.assert_array_equal(short.q, long.q[:, :20])
        np.testing.assert_allclose(jnp.linalg.norm(long.k, axis=-1), 1, rtol=1e-5)
    assert jax.numpy.abs(vectors.drawn("skewed", 400, 1).q.mean(axis=1)).mean() > 0.5


def test_queries_of_a_run_that_is_not_there(counts, tmp_path):
    vectors = importlib.import_module("coverage_vectors")
    with pytest.raises(SystemExit, match=f"no run in {tmp_path}"):  # before anything is counted
        vectors.of_run(tmp_path, None)
