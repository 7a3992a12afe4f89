"""Training with Reformer's attention: the loop and files of train.py, and the same model where chunks part nothing."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.transformer import Transformer, TransformerConfig
from sparse_flash_jax.flax.pattern import Dense, Hash
from training.errors import CheckpointError, ConfigError
from training.metrics import read_metrics
from training.trained import load_trained

TINY = (
    *("--model.layers", "1", "--model.width", "16", "--model.heads", "2", "--buckets", "4", "--attention", "hash"),
    *("--model.shared-qk", "--length", "64", "--steps", "2", "--log-every", "1"),
    *("--evaluation.every", "0", "--evaluation.final-windows", "2", "--sample.tokens", "5", "--sample.prompt", "9"),
)


@pytest.fixture(scope="module")
def train_reformer(benchmark_module):
    return benchmark_module("train_reformer")


def test_a_run_is_one_of_train_py(train_reformer, tmp_path, monkeypatch, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("".join(f"line {number}: the same words again\n" for number in range(500)))
    settings = [*TINY, "--data", str(text), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["train_reformer.py", "--chunk", "4", *settings])
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert train_reformer.main() == 0
    assert "no sample: Reformer's attention has no cache." in capsys.readouterr().out
    records = read_metrics(out / "metrics.jsonl")
    assert [record["kind"] for record in records] == ["train", "train", "final", "end"]
    # A query sees its own chunk and the one before at most: fewer than 8 others of 64 tokens.
    assert all(0 < record["visible"][0] < 8 * 64 / (64 * 65 / 2) for record in records[:2])
    assert all(np.isfinite([record["loss"], record["grad_norm"]]).all() for record in records[:2])

    with pytest.raises(CheckpointError, match=r"of another model, Reformer\(chunk=4\)"):
        load_trained(out)


def test_the_same_model_where_chunks_part_nothing(train_reformer):
    config = TransformerConfig(
        64,
        num_layers=2,
        width=16,
        num_heads=2,
        positions="rope",
        attention=(Dense(backend="xla"), Hash(4, exclude_self=True, centred=True)),
        shared_scale=1.0,
    )
    model = Transformer(config, rngs=nnx.Rngs(params=0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 48)), jnp.int32)

    @jax.jit
    def both(params, key):
        structures = nnx.graphdef(model), train_reformer.Reformer(48)(config)
        return [nnx.merge(structure, params).hidden(tokens, key=key) for structure in structures]

    (hidden, exact), (chunked, reformer) = both(nnx.state(model), jax.random.key(1))
    np.testing.assert_allclose(reformer.visible, exact.visible, rtol=1e-6)
    # A token that sees none outputs 0 with us and its own value there; no layer follows in which others see that.
    differs = np.abs(np.asarray(hidden) - np.asarray(chunked)).max(axis=-1) > 1e-5
    assert 0 < differs.sum() < differs.size / 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": Dense()}, "no layer is of that kind"),
        ({"attention": Hash(4), "shared_qk": False}, "add --model.shared-qk"),
    ],
)
def test_settings_that_are_not_reformers_are_refused(train_reformer, options, message):
    with pytest.raises(ConfigError, match=message):
        train_reformer.Reformer()(TransformerConfig(64, num_layers=1, width=16, num_heads=2, **options))
