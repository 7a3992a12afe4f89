"""The language model: causal by gradient, dense and sparse alike, exact in its options."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.transformer import Transformer, TransformerConfig, dense_twin
from sparse_flash_jax.flax.pattern import QK, Dense, Hash
from tests.jaxprs import calls, primitives

B, T = 2, 24
KEY = jax.random.key(3)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 50, (B, T)), jnp.int32)
SMALL = TransformerConfig(vocab_size=50, num_layers=2, width=32, num_heads=4, max_length=32)


def make(**changes):
    return Transformer(dataclasses.replace(SMALL, **changes), rngs=nnx.Rngs(0))


@nnx.jit
def logits(model, tokens, key, segment_ids=None):
    return model(tokens, key=key, segment_ids=segment_ids)


@pytest.mark.parametrize("attention", [Dense(), Hash(4, exclude_self=True), (QK(0.3), Dense(window=3))], ids=str)
def test_causal_by_gradient(attention):
    model = make(attention=attention, positions="rope")
    place = T // 2

    def before(change):
        # A change of the embeddings at each position, seen through the logits at `place`.
        def embedded(tokens):
            return table[tokens] + change

        table = model.embedding[...]
        hidden = embedded(TOKENS)
        for number, block in enumerate(model.blocks):
            hidden, _ = block(hidden, jax.random.fold_in(KEY, number), None)
        return jnp.sum(model.logits(model.norm(hidden))[:, place])

    gradient = jax.jit(jax.grad(before))(jnp.zeros((B, T, SMALL.width)))
    np.testing.assert_array_equal(gradient[:, place + 1 :], 0.0)
    assert float(jnp.max(jnp.abs(gradient[:, : place + 1]))) > 0


def test_changing_a_later_token_changes_no_earlier_logit():
    model = make()
    changed = TOKENS.at[:, 15].set(7)
    first, second = (logits(model, tokens, KEY) for tokens in (TOKENS, changed))
    # Another bucket for the later token moves earlier ones to other slots, and their sums to other tiles.
    np.testing.assert_allclose(first[:, :15], second[:, :15], rtol=0, atol=1e-6)
    assert bool(jnp.any(first[:, 15:] != second[:, 15:]))


def test_dense_twin_differs_in_the_mask_only():
    config = dataclasses.replace(SMALL, attention=(Hash(4), QK(0.5)))
    sparse, dense = (Transformer(each, rngs=nnx.Rngs(0)) for each in (config, dense_twin(config)))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(sparse, nnx.Param), nnx.state(dense, nnx.Param))


def test_dense_is_nothing_dropped():
    dense, kept = (logits(make(attention=attention), TOKENS, KEY) for attention in (Dense(), QK(0.0)))
    np.testing.assert_allclose(dense, kept, atol=1e-5)


def test_dense_is_hash_when_all_share_a_bucket():
    # With the same token everywhere and no positions but rotary ones, every query falls into one bucket.
    tokens = jnp.full((B, T), 5, jnp.int32)
    dense, hashed = (
        logits(make(attention=attention, positions="rope", num_layers=1), tokens, KEY)
        for attention in (Dense(), Hash(2))
    )
    np.testing.assert_allclose(dense, hashed, atol=1e-5)


@pytest.mark.parametrize("backend", [None, "xla"])
def test_grouped_heads_and_dense_backend(backend):
    config = dataclasses.replace(SMALL, shared_qk=False, num_key_heads=2, attention=Dense())
    ours = logits(Transformer(config, rngs=nnx.Rngs(0)), TOKENS, KEY)
    named = logits(Transformer(dense_twin(config, backend), rngs=nnx.Rngs(0)), TOKENS, KEY)
    np.testing.assert_allclose(ours, named, atol=1e-5)


def test_bfloat16_policy():
    model = make(dtype="bfloat16")
    hidden, _ = model.hidden(TOKENS, key=KEY)
    rounded = model.logits(hidden)
    assert (hidden.dtype, rounded.dtype) == (jnp.bfloat16, jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {np.dtype("float32")}
    exact = logits(make(), TOKENS, KEY)
    # 8 bits of mantissa through two layers; hashes of rounded queries may differ for some tokens.
    assert float(jnp.median(jnp.abs(rounded - exact))) < 0.02


def test_layer_stats():
    _, stats = make(attention=(Dense(), Hash(4, exclude_self=True))).hidden(TOKENS, key=KEY)
    assert float(stats.visible[0]) == pytest.approx(1.0)
    assert 0 < float(stats.visible[1]) < 1
    np.testing.assert_array_equal(stats.overflow, 0)


def test_layers_and_keys_hash_anew():
    model = make(attention=Hash(8))
    first, second = (model.hidden(TOKENS, key=jax.random.key(seed))[1].visible for seed in (0, 1))
    assert float(first[0]) != float(second[0])


def gradient_with(remat):
    """The gradient of a block's loss, as a function of the parameters, and the parameters."""
    structure, params = nnx.split(make(attention=Hash(4), remat=remat, num_layers=1), nnx.Param)
    return jax.grad(lambda params: jnp.mean(nnx.merge(structure, params)(TOKENS, key=KEY) ** 2)), params


# Runs of the attention's forward kernel, sorts of the plan, and GELUs (each a tanh), of one block.
@pytest.mark.parametrize(
    ("remat", "attends", "sorts", "gelus"), [("none", 1, 1, 1), ("attention", 1, 1, 2), ("full", 2, 2, 2)]
)
def test_remat_computes_again_what_it_says(remat, attends, sorts, gelus):
    gradient, params = gradient_with(remat)
    jaxpr = jax.make_jaxpr(gradient)(params)
    assert (calls(jaxpr, "_attend"), calls(jaxpr, "_backward")) == (attends, 1)
    assert (primitives(jaxpr).count("sort"), primitives(jaxpr).count("tanh")) == (sorts, gelus)


@pytest.mark.parametrize("remat", ["attention", "full"])
def test_remat_changes_no_gradient(remat):
    (computed_again, params), (kept, _) = gradient_with(remat), gradient_with("none")
    assert_close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6)
    jax.tree.map(assert_close, jax.jit(computed_again)(params), jax.jit(kept)(params))


def test_remat_that_is_none_of_these():
    with pytest.raises(ValueError, match="remat must be 'none', 'attention' or 'full', got True"):
        logits(make(remat=True), TOKENS, KEY)


def test_segments_separate_documents():
    model = make(attention=Hash(2), positions="rope")
    segment_ids = jnp.asarray([[0] * 10 + [1] * 14] * B, jnp.int32)
    together = logits(model, TOKENS, KEY, segment_ids)
    np.testing.assert_allclose(together[:, 10:], logits(model, TOKENS[:, 10:], KEY), atol=1e-4)


def test_wrong_sizes():
    with pytest.raises(ValueError, match="one pattern for each of 2 layers"):
        make(attention=(Dense(),))
    with pytest.raises(ValueError, match="max_length=32"):
        make()(jnp.zeros((1, 33), jnp.int32), key=KEY)
