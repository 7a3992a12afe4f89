"""The step: exact loss, accumulation, learning, randomness from the step alone."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from models.documents import document_ids
from models.transformer import Transformer, TransformerConfig
from sparse_flash_jax.flax.pattern import BlockTopK, Dense, Hash, Window
from tests.jaxprs import equations
from training import loss as loss_module
from training.batches import EvaluationBatch
from training.config import OptimizerConfig
from training.data import Stream
from training.evaluation import evaluate, unigram
from training.loss import total_cross_entropy
from training.optimizer import learning_rate, make_optimizer, updated_where
from training.sampling import sample
from training.step import evaluation_params, init_state, make_evaluation_step, make_train_step


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax raises a float to an integer power, which the strict rules forbid."""
    with jax.numpy_dtype_promotion("standard"):
        yield


DENSE = TransformerConfig(vocab_size=20, num_layers=1, width=32, num_heads=2, max_length=32, attention=Dense())
# Far fewer instructions to compile, where attention is not the question.
CHEAP = dataclasses.replace(DENSE, attention=Dense(backend="xla"))
TOKENS = np.random.default_rng(0).integers(0, 20, (4, 25)).astype(np.int32)


def start(config=DENSE, rate=3e-3, end_token=None, ema=None, skip=False):
    optimizer = make_optimizer(OptimizerConfig(learning_rate=rate), 40)
    structure, state = init_state(config, optimizer, seed=0, average=ema is not None, skip_non_finite=skip)
    return structure, state, make_train_step(structure, optimizer, 0, end_token, ema=ema)


@functools.cache
def averaging_and_skipping_step():
    return start(CHEAP, ema=0.75, skip=True)[1:]


def averaging_and_skipping():
    """A fresh state that averages and skips, and its step, compiled once."""
    state, step = averaging_and_skipping_step()
    return jax.tree.map(jnp.copy, state), step


def float_dtypes(tree):
    return {leaf.dtype.name for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)}


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


@pytest.mark.parametrize(("batch", "parts", "over"), [(2, 1, (1, 1)), (8, 1, (4, 1)), (2, 4, (1, 4)), (4, 2, (2, 2))])
def test_each_device_has_chunks_of_the_same_size(batch, parts, over):
    """Of 2 sequences, or parts of them, of 16384 tokens, whatever others have: 7 chunks, of whole tiles of rows."""
    tokens = jax.ShapeDtypeStruct((batch, parts * 16_384), jnp.int32)
    split = functools.partial(loss_module._split, loss_module._Division(*over), 50_304)
    (chunks,) = jax.eval_shape(split, tokens)
    assert chunks.shape == (7, batch, parts * 37 * loss_module._ROWS // 2)


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


def test_kinds_by_turns_learn_a_repeated_text():
    """A window with sinks, chosen blocks and buckets; all parameters of each layer move."""
    patterns = (Window(3, sinks=1), BlockTopK(4, 3), Hash(4))
    config = TransformerConfig(
        vocab_size=20, num_layers=3, width=32, num_heads=2, max_length=32, attention=patterns, shared_qk=False
    )
    _, state, step = start(config, rate=1e-2)
    before = jax.tree.map(jnp.copy, state.params)
    text = np.tile(np.arange(12), 5).astype(np.int32)
    measured = []
    for number in range(40):
        phase = number % 12
        state, metrics = step(state, np.stack([text[phase : phase + 33], text[phase + 3 : phase + 36]])[None])
        measured.append(metrics)
    losses = [float(each.loss) for each in measured]
    assert np.isfinite(losses).all()
    assert losses[0] > 2.5
    assert losses[-1] < 0.5
    moved = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), state.params, before)
    assert min(jax.tree.leaves(moved)) > 0
    visible = np.asarray(measured[-1].layers.visible)
    assert 0 < visible.min() < visible.max() < 1


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_bfloat16_learns_a_repeated_text(param_dtype):
    structure, state, step = start(dataclasses.replace(CHEAP, dtype="bfloat16", param_dtype=param_dtype), rate=1e-2)
    # All begin with the same parameters, rounded.
    rounded = jax.tree.map(lambda leaf: leaf.astype(param_dtype), start(CHEAP)[1].params)
    jax.tree.map(np.testing.assert_array_equal, state.params, rounded)
    text = np.tile(np.arange(12), 4).astype(np.int32)
    measured = []
    for phase in (number % 12 for number in range(30)):
        batch = np.stack([text[phase : phase + 25], text[phase + 3 : phase + 28]])[:, None]
        state, metrics = step(state, batch)
        measured.append(metrics)
    assert float(measured[0].loss) > 2.5
    assert float(measured[-1].loss) < 1.0
    assert float_dtypes(measured) == {"float32"}
    assert float_dtypes(state.params) == {param_dtype}
    assert float_dtypes(state.optimizer) == {"float32"}
    hidden = jax.eval_shape(
        lambda params: nnx.merge(structure, params).hidden(jnp.asarray(TOKENS), key=jax.random.key(0))[0], state.params
    )
    assert hidden.dtype == jnp.bfloat16


def test_gradients_of_short_parameters_add_up_in_float32():
    _, state, step = start(dataclasses.replace(DENSE, dtype="bfloat16", param_dtype="bfloat16"))
    accumulation = 3
    jaxpr = jax.make_jaxpr(step)(state, np.stack([TOKENS] * accumulation))
    (scan,) = [e for e in equations(jaxpr) if e.primitive.name == "scan" and e.params["length"] == accumulation]
    sums = [variable.aval for variable in scan.outvars]
    assert {leaf.shape for leaf in jax.tree.leaves(state.params)} <= {each.shape for each in sums}
    assert float_dtypes(sums) == {"float32"}


def test_steps_repeat_bit_for_bit():
    runs = []
    for _ in range(2):
        _, state, step = start(TransformerConfig(20, 1, 32, 2, max_length=32, attention=Hash(4, exclude_self=True)))
        for _ in range(2):
            state, metrics = step(state, TOKENS[None])
            runs.append(metrics)
        runs.append(state)
    jax.tree.map(np.testing.assert_array_equal, runs[:3], runs[3:])


def schedule_count(state):
    is_schedule = lambda node: isinstance(node, optax.ScaleByScheduleState)
    nodes = jax.tree.leaves(state.optimizer, is_leaf=is_schedule)
    (node,) = [node for node in nodes if is_schedule(node)]
    return int(node.count)


def test_steps_that_are_not_finite_are_skipped():
    copied = functools.partial(jax.tree.map, np.array)
    _, state, plain_step = start(CHEAP)
    skipping, step = averaging_and_skipping()
    for _ in range(2):
        state, _ = plain_step(state, TOKENS[None])
        skipping, _ = step(skipping, TOKENS[None])
    # Where all is finite, skipping changes no bit.
    jax.tree.map(np.testing.assert_array_equal, skipping[:3], state[:3])
    assert skipping.skipped == (0, 0)

    before = copied(skipping)
    broken = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), before.params)
    for missed in (1, 2):
        skipping, metrics = step(skipping._replace(params=broken), TOKENS[None])
        assert not np.isfinite(metrics.loss)
        assert (skipping.skipped, metrics.skipped) == ((missed, missed),) * 2
    after = copied(skipping)
    assert (after.step, schedule_count(after)) == (4, 4)
    as_before = updated_where(jnp.array(False), after.optimizer, before.optimizer)
    jax.tree.map(np.testing.assert_array_equal, after.optimizer, as_before)
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.ema), (broken, before.ema))

    skipping, metrics = step(skipping._replace(params=before.params), TOKENS[None])
    assert metrics.skipped == (2, 0)
    assert np.isfinite(metrics.loss)
    assert float(jnp.max(jnp.abs(skipping.params["embedding"][...] - before.params["embedding"][...]))) > 0


def test_averages_are_of_what_was_updated():
    state, step = averaging_and_skipping()
    first = jax.tree.map(np.array, state.params)
    assert evaluation_params(state._replace(ema=None)) is state.params
    table: Callable[[Any], np.ndarray] = lambda params: np.asarray(params["embedding"][...], np.float64)
    seen = []
    for number in range(4):
        skips = number == 1
        before = jax.tree.map(np.array, state.params)
        broken = jax.tree.map(lambda leaf: np.full_like(leaf, np.inf), before)
        state, _ = step(state._replace(params=broken) if skips else state, TOKENS[None])
        if skips:
            state = state._replace(params=before)
        else:
            seen.append(table(state.params))
        weights = 0.75 ** np.arange(len(seen))[::-1]
        expected = np.tensordot(weights / weights.sum(), np.stack(seen), axes=1)
        # Three products and sums in float32.
        np.testing.assert_allclose(table(evaluation_params(state)), expected, rtol=0, atol=1e-6)
    assert np.max(np.abs(table(evaluation_params(state)) - table(first))) > 1e-3


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
