"""The step: exact loss, accumulation, learning, randomness from the step alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.transformer import Transformer, TransformerConfig
from sparse_flash_jax.flax.pattern import Dense, Hash
from training import loss as loss_module
from training.batches import EvaluationBatch
from training.config import OptimizerConfig
from training.data import Stream
from training.evaluation import evaluate, unigram
from training.loss import total_cross_entropy
from training.optimizer import learning_rate, make_optimizer
from training.sampling import sample
from training.step import document_ids, init_state, make_evaluation_step, make_train_step


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax raises a float to an integer power, which the strict rules forbid."""
    with jax.numpy_dtype_promotion("standard"):
        yield


DENSE = TransformerConfig(vocab_size=20, num_layers=1, width=32, num_heads=2, max_length=32, attention=Dense())
TOKENS = np.random.default_rng(0).integers(0, 20, (4, 25)).astype(np.int32)


def start(config=DENSE, rate=3e-3, end_token=None):
    optimizer = make_optimizer(OptimizerConfig(learning_rate=rate), 40)
    structure, state = init_state(config, optimizer, seed=0)
    return structure, state, make_train_step(structure, optimizer, 0, end_token)


# Chunks of a position; of 5, the last one padded; of whole tiles of 8 rows, which is 2 positions; one chunk.
@pytest.mark.parametrize(("elements", "rows"), [(1, 1), (1300, 1), (64 * 4 * 5, 8), (1 << 28, 128)])
def test_chunked_loss_is_exact(monkeypatch, elements, rows):
    monkeypatch.setattr(loss_module, "_CHUNK_ELEMENTS", elements)
    monkeypatch.setattr(loss_module, "_ROWS", rows)
    model = Transformer(DENSE, rngs=nnx.Rngs(0))
    hidden = jax.random.normal(jax.random.key(0), (4, 24, 32))
    targets = jnp.asarray(TOKENS[:, 1:])
    weights = jax.random.uniform(jax.random.key(1), (4, 24))

    def plain(model, hidden, weights):
        log_p = jax.nn.log_softmax(model.logits(hidden))
        return jnp.sqrt(-jnp.sum(weights * jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]))

    def chunked(model, hidden, weights):
        return jnp.sqrt(total_cross_entropy(model, hidden, targets, weights))

    np.testing.assert_allclose(chunked(model, hidden, weights), plain(model, hidden, weights), rtol=1e-6)
    got, expected = (nnx.grad(f, argnums=(0, 1, 2))(model, hidden, weights) for f in (chunked, plain))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_loss_of_short_states_keeps_float32_sums(monkeypatch):
    """Products of bfloat16 operands, summed in float32 within a chunk and over chunks."""
    monkeypatch.setattr(loss_module, "_CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(loss_module, "_ROWS", 1)
    model = Transformer(DENSE, rngs=nnx.Rngs(0))
    model.embedding[...] = model.embedding[...].astype(jnp.bfloat16).astype(jnp.float32)
    hidden = jax.random.normal(jax.random.key(0), (4, 24, 32), jnp.bfloat16)
    targets, weights = jnp.asarray(TOKENS[:, 1:]), jnp.ones((4, 24))

    def gradients(hidden):
        total = lambda model, hidden: total_cross_entropy(model, hidden, targets, weights)
        return nnx.grad(total, argnums=(0, 1))(model, hidden)

    short, full = gradients(hidden), gradients(hidden.astype(jnp.float32))
    assert short[1].dtype == jnp.bfloat16
    (got,), (expected,) = (jax.tree.leaves(nnx.state(g, nnx.Param)["embedding"]) for g in (short[0], full[0]))
    assert got.dtype == jnp.float32
    # Each of 96 terms has a rounding of its own, of dlogits: sums that were rounded to bfloat16 would err by more.
    error = jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected)
    assert error < 2e-3


def test_accumulation_is_one_big_batch():
    results = []
    for shape in ((1, 4, 25), (4, 1, 25)):
        _, state, step = start()
        state, metrics = step(state, TOKENS.reshape(shape))
        results.append((state.params, metrics.loss, metrics.grad_norm))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *results)


def test_learns_a_repeated_text_and_continues_it():
    config = TransformerConfig(
        vocab_size=20, num_layers=2, width=32, num_heads=2, max_length=32, attention=(Dense(window=4), Hash(4))
    )
    structure, state, step = start(config, rate=1e-2)
    text = np.tile(np.arange(12), 5).astype(np.int32)
    losses = []
    for number in range(40):
        phase = number % 12
        state, metrics = step(state, np.stack([text[phase : phase + 33], text[phase + 3 : phase + 36]])[None])
        losses.append(float(metrics.loss))
    assert losses[0] > 2.5
    assert losses[-1] < 0.5
    settings: dict[str, Any] = {"count": 8, "temperature": 0.0, "end_token": None}
    keys: dict[str, Any] = {"pattern_key": jax.random.key(0), "key": jax.random.key(1)}
    continued = sample(structure, state.params, text[:16], **settings, **keys)
    np.testing.assert_array_equal(continued, text[16:24])


def test_steps_repeat_bit_for_bit():
    runs = []
    for _ in range(2):
        _, state, step = start(TransformerConfig(20, 1, 32, 2, max_length=32, attention=Hash(4, exclude_self=True)))
        for _ in range(2):
            state, metrics = step(state, TOKENS[None])
            runs.append(metrics)
        runs.append(state)
    jax.tree.map(np.testing.assert_array_equal, runs[:3], runs[3:])


def test_documents_are_numbered():
    tokens = jnp.asarray([[1, 9, 2, 3, 9, 9, 4]], jnp.int32)
    np.testing.assert_array_equal(document_ids(tokens, 9), [[0, 0, 1, 1, 1, 2, 3]])


def test_separate_documents_do_not_see_each_other():
    structure, state, _ = start()
    evaluation_step = make_evaluation_step(structure, 0, end_token=0)
    tokens = TOKENS.clip(1)
    tokens[:, 10] = 0
    changed = tokens.copy()
    changed[:, :10] = 5
    weights = np.zeros((4, 24), np.float32)
    weights[:, 12:] = 1.0
    first, second = (float(evaluation_step(state.params, each, weights)) for each in (tokens, changed))
    assert first == pytest.approx(second, rel=1e-6)
    everything = make_evaluation_step(structure, 0, end_token=None)
    assert float(everything(state.params, tokens, weights)) != float(everything(state.params, changed, weights))


def test_sampling_keeps_documents_apart():
    structure, state, _ = start()
    prompt = TOKENS[0, :12].clip(1)
    prompt[6] = 0
    changed = np.concatenate([np.full(6, 5, np.int32), prompt[6:]])
    settings: dict[str, Any] = {"count": 12, "temperature": 1.0, "end_token": 0}
    keys: dict[str, Any] = {"pattern_key": jax.random.key(0), "key": jax.random.key(1)}
    first, second = (sample(structure, state.params, each, **settings, **keys) for each in (prompt, changed))
    np.testing.assert_array_equal(first, second)


def test_evaluation_counts_bytes_of_text():
    batch = EvaluationBatch(TOKENS, np.ones((4, 24), np.float32), num_bytes=300)
    uniform = evaluate(lambda *_: jnp.asarray(96 * np.log(20.0), jnp.float32), nnx.State({}), [batch])
    assert uniform.loss == pytest.approx(np.log(20))
    assert uniform.perplexity == pytest.approx(20)
    assert uniform.bits_per_byte == pytest.approx(96 * np.log2(20) / 300)


def test_unigram_is_the_entropy_of_its_own_text():
    tokens = np.repeat(np.arange(4), 2500).astype(np.uint16)
    windows = np.tile(np.arange(4), 7)[None, :25].astype(np.int32)
    batch = EvaluationBatch(windows, np.ones((1, 24), np.float32), num_bytes=24)
    baseline = unigram(Stream(tokens, np.ones(10_000, np.int32), 1), 4, [batch])
    assert baseline.bits_per_byte == pytest.approx(2.0, abs=1e-3)


def test_learning_rate_rises_and_falls():
    schedule = learning_rate(OptimizerConfig(learning_rate=1.0, warmup=0.1, final=0.1), 100)
    rates = [float(np.asarray(schedule(step))) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(rates[10]) == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.1)
    assert np.all(np.diff(rates[10:]) <= 0)
