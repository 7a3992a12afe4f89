"""`Auto` on each side of break-even: it is the pattern that it chooses, in outputs, gradients and traces."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.transformer import Transformer, TransformerConfig
from sparse_flash_jax import time_share
from sparse_flash_jax.flax import linen as sparse_linen
from sparse_flash_jax.flax.nnx import QK, Auto, Dense, Hash, SparseSelfAttention, attention_fn
from tests.gpus import H100, put_device

D, N = 16, 2
KEY = jax.random.key(7)
HASH = Hash(4, exclude_self=True)
SHORT, LONG = 24, 48  # below and above the break-even of the table below


def row(length, share):
    return {"length": length, "own_dense": 1.0, "hash": [[0.25, share], [1.0, 4 * share]], "qk": [[0.25, 2 * share]]}


@pytest.fixture(autouse=True)
def break_even_at_32_tokens(monkeypatch):
    """Hash(4) takes twice dense attention's time at 16 tokens and half of it at 64; dropping twice that."""
    table = {kind: {"lengths": [row(16, 2.0), row(64, 0.5)]} for kind in ("cpu", H100)}
    monkeypatch.setattr(time_share, "_measured", lambda: table)


def choose(pattern, length, **options):
    return pattern.choose(length, **{"dtype": "bfloat16", "head_dim": 64} | options)


@pytest.mark.parametrize(
    ("pattern", "length", "expected"),
    [
        (Auto(HASH), SHORT, Dense()),
        (Auto(HASH), LONG, HASH),
        (Auto(HASH, density=1.0), LONG, Dense()),
        (Auto(QK(0.5)), LONG, Dense()),
        (Auto(QK(0.5)), 1000, Dense()),  # equally fast
    ],
    ids=str,
)
def test_the_faster_is_chosen(pattern, length, expected):
    assert choose(pattern, length, dtype="float32").pattern == expected


def test_expected_density():
    assert Auto(Hash(16)).expected_density == 1 / 16
    assert Auto(QK(0.3)).expected_density == pytest.approx(0.49)
    assert Auto(Hash(16), density=0.3).expected_density == 0.3


def test_on_a_gpu_dense_attention_is_cudnns_where_it_can(monkeypatch):
    put_device(monkeypatch)
    assert choose(Auto(HASH), SHORT).pattern == Dense(backend="cudnn")
    assert choose(Auto(HASH), LONG).pattern == HASH
    for refused in ({"dtype": "float32"}, {"implementation": "triton"}, {"head_dim": 20}):
        assert choose(Auto(HASH), SHORT, **refused).pattern == Dense(), refused
    put_device(monkeypatch, "NVIDIA A100-SXM4-80GB", "8.0")
    assert choose(Auto(HASH), SHORT, head_dim=128).pattern == Dense(backend="cudnn")
    assert choose(Auto(HASH), SHORT, head_dim=256).pattern == Dense()


def test_own_dense_attention_is_weighed_where_it_would_run(monkeypatch):
    table = {H100: {"lengths": [{"length": 16, "own_dense": 0.4, "hash": [[0.25, 0.5]]}]}}
    monkeypatch.setattr(time_share, "_measured", lambda: table)
    put_device(monkeypatch)
    by_cudnn, own = choose(Auto(HASH), 16), choose(Auto(HASH), 16, implementation="triton")
    assert (by_cudnn.share, own.share) == (0.5, 1.25)
    assert (by_cudnn.pattern, own.pattern) == (HASH, Dense())


def test_an_unknown_device_gets_what_was_asked_for(monkeypatch):
    put_device(monkeypatch, "TPU v5 lite", "none")
    choice = choose(Auto(HASH), SHORT)
    assert (choice.pattern, choice.share) == (HASH, None)
    assert "no device like this" in str(choice)


def test_documents_get_what_was_asked_for(monkeypatch):
    put_device(monkeypatch)
    choice = choose(Auto(HASH), SHORT, documents=True)
    assert (choice.pattern, choice.share) == (HASH, None)
    assert "not with documents" in str(choice)


def test_the_choice_tells_why(monkeypatch):
    put_device(monkeypatch, "NVIDIA H200")
    text = str(choose(Auto(HASH), 16))
    for part in ("dense: at 16 tokens and density 0.25", str(HASH), "2.00 of the time of cuDNN's", H100, "NVIDIA H200"):
        assert part in text
    assert str(choose(Auto(HASH), LONG)).startswith("sparse: at 48 tokens")


def test_wrong_options():
    with pytest.raises(ValueError, match="no measurements of windows"):
        Auto(Hash(4, window=9))
    with pytest.raises(ValueError, match="no measurements of several rounds"):
        Auto(Hash(4, rounds=2))
    for density in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="density"):
            Auto(HASH, density=density)


def test_wrong_patterns(without_shape_checks):
    for pattern in (Dense(), Auto(HASH), "hash"):
        with pytest.raises(TypeError, match=r"Auto weighs a Hash or QK .*, got "):
            Auto(pattern)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("length", "chosen"), [(SHORT, Dense()), (LONG, HASH)], ids=["dense", "sparse"])
class TestInBothApis:
    """On a CPU, where dense attention is this package's own."""

    def test_nnx(self, length, chosen):
        x = jax.random.normal(KEY, (1, length, D))
        automatic, named = (SparseSelfAttention(D, N, pattern, rngs=nnx.Rngs(0)) for pattern in (Auto(HASH), chosen))
        loss = lambda layer, x: jnp.sum(layer(x, key=KEY) ** 2)
        for number in (0, 1):
            ours, theirs = (nnx.grad(loss, argnums=number)(layer, x) for layer in (automatic, named))
            jax.tree.map(np.testing.assert_array_equal, ours, theirs)
            assert any(jnp.any(leaf != 0) for leaf in jax.tree.leaves(ours))

    def test_linen(self, length, chosen):
        x = jax.random.normal(KEY, (1, length, D))
        parameters = sparse_linen.SparseSelfAttention(N, chosen).init(KEY, x, key=KEY)

        def gradient(pattern):
            out: Any = lambda p: sparse_linen.SparseSelfAttention(N, pattern).apply(p, x, key=KEY)
            return jax.grad(lambda p: jnp.sum(out(p) ** 2))(parameters)

        jax.tree.map(np.testing.assert_array_equal, gradient(Auto(HASH)), gradient(chosen))

    def test_adapter(self, length, chosen):
        q, k, v = jax.random.normal(KEY, (3, 1, length, N, D))
        ours, theirs = (attention_fn(pattern, key=KEY)(q, k, v) for pattern in (Auto(HASH), chosen))
        np.testing.assert_array_equal(ours, theirs)

    def test_the_plan_is_the_chosen_ones(self, length, chosen):
        q, k = jax.random.normal(KEY, (2, 1, length, N, D))
        ours, theirs = (pattern.plan(q, k, key=KEY).mask() for pattern in (Auto(HASH), chosen))
        np.testing.assert_array_equal(ours, theirs)

    def test_nothing_of_the_other_is_traced(self, length, chosen):
        q, k, v = jax.random.normal(KEY, (3, 1, length, N, D))
        traces = [
            str(jax.make_jaxpr(lambda *qkv, pattern=pattern: attention_fn(pattern, key=KEY)(*qkv))(q, k, v))
            for pattern in (Auto(HASH), chosen)
        ]
        assert traces[0] == traces[1]
        assert ("argmax" in traces[0]) == (chosen == HASH)


def test_scored_dropping_has_its_parameters_at_every_length():
    layer = SparseSelfAttention(D, N, Auto(QK(0.5, scored=True)), rngs=nnx.Rngs(0))
    assert layer.query_score is not None
    assert layer(jnp.ones((1, SHORT, D))).shape == (1, SHORT, D)
    with pytest.raises(ValueError, match="scores"):
        attention_fn(Auto(QK(0.5, scored=True)))


class TestScoredDropping:
    """Scores gate values and outputs where they choose tokens, and not in the dense attention chosen instead."""

    PATTERN = QK(0.5, scored=True)

    @pytest.fixture(autouse=True)
    def dropping_pays_from_32_tokens(self, monkeypatch):
        rows = [{"length": length, "own_dense": 1.0, "qk": [[0.25, share]]} for length, share in ((16, 2.0), (64, 0.5))]
        monkeypatch.setattr(time_share, "_measured", lambda: {"cpu": {"lengths": rows}})

    @pytest.mark.parametrize(("length", "chosen"), [(SHORT, Dense()), (LONG, PATTERN)], ids=["dense", "sparse"])
    def test_nnx(self, length, chosen):
        x = jax.random.normal(KEY, (1, length, D))
        automatic, named = (SparseSelfAttention(D, N, p, rngs=nnx.Rngs(0)) for p in (Auto(self.PATTERN), chosen))
        named.query, named.key, named.value, named.out = (
            automatic.query,
            automatic.key,
            automatic.value,
            automatic.out,
        )
        np.testing.assert_array_equal(automatic(x), named(x))

    @pytest.mark.parametrize(("length", "chosen"), [(SHORT, Dense()), (LONG, PATTERN)], ids=["dense", "sparse"])
    def test_linen(self, length, chosen):
        x = jax.random.normal(KEY, (1, length, D))
        automatic, named = (sparse_linen.SparseSelfAttention(N, pattern) for pattern in (Auto(self.PATTERN), chosen))
        parameters = automatic.init(KEY, x)
        np.testing.assert_array_equal(automatic.apply(parameters, x), named.apply(parameters, x))


def test_a_model_chooses_at_each_length():
    config = TransformerConfig(vocab_size=8, num_layers=1, width=16, num_heads=2, max_length=64, attention=Auto(HASH))
    assert hash(config) == hash(dataclasses.replace(config))
    model = Transformer(config, rngs=nnx.Rngs(0))
    stats = nnx.jit(lambda model, tokens: model.hidden(tokens, key=KEY)[1])
    visible = [stats(model, jnp.zeros((1, length), jnp.int32)).visible[0] for length in (SHORT, LONG)]
    assert float(visible[0]) == pytest.approx(1.0)
    assert float(visible[1]) < 0.99  # equal tokens share a bucket, but a token does not see itself
