"""Training over a mesh: the losses of one device, whatever the mesh, and nothing moves that need not."""

import dataclasses
import re
from collections import defaultdict
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.cache import init_cache, prefill
from models.transformer import Transformer, TransformerConfig
from sparse_flash_jax import to_zigzag
from sparse_flash_jax.flax.pattern import QK, Dense, Hash
from tests.jaxprs import primitives
from training.checkpoint import Checkpoints, restore
from training.config import BatchConfig, ModelConfig, OptimizerConfig, TrainConfig, identity
from training.errors import ConfigError
from training.mesh import ONE_DEVICE, Layout, make_layout
from training.optimizer import make_optimizer
from training.step import evaluation_params, init_state, make_evaluation_step, make_train_step, structure_of

MOVED = re.compile(r"= (\w+)\[([\d,]*)\]\S* (all-gather|all-to-all|reduce-scatter|collective-permute)\(")

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")

# A layer of each kind that the losses could depend on the mesh by: drops and hashes are random.
MODEL = TransformerConfig(
    vocab_size=60,
    num_layers=3,
    width=32,
    num_heads=4,
    max_length=24,
    attention=(Dense(), Hash(4, exclude_self=True), QK(0.3)),
)
# Two micro-batches, of packed rows: in each, documents begin at other places, so that devices have unlike counts.
TOKENS = np.random.default_rng(0).integers(0, 60, (2, 4, 25)).astype(np.int32)
TOKENS[:, np.arange(4), [0, 5, 9, 20]] = ~TOKENS[:, np.arange(4), [0, 5, 9, 20]]
TOKENS[:, 3, 12:] = ~TOKENS[:, 3, 12:]
SETTINGS = TrainConfig(batch=BatchConfig(size=4), model=ModelConfig(width=32, heads=4))
STEPS = 2


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax raises a float to an integer power, which the strict rules forbid."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def layout_of(mesh, parallel="jit", **more):
    return make_layout(dataclasses.replace(SETTINGS, mesh=mesh, parallel=parallel, **more))


def trained(layout: Layout):
    """Losses and gradient norms of a few steps, the state after them, the loss of an evaluation, and the step's HLO."""
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2), 10)
    _, state = init_state(MODEL, optimizer, 0, layout, average=True, skip_non_finite=True)
    structure = structure_of(layout.training_model(MODEL))
    step = cast(jax.stages.Wrapped, make_train_step(structure, optimizer, 0, None, layout, ema=0.5, packed=True))
    batch = layout.place(TOKENS)
    compiled = step.lower(state, batch).compile()
    measured = []
    for _ in range(STEPS):
        state, metrics = compiled(state, batch)
        measured.append((metrics.loss, metrics.grad_norm, *metrics.layers))
    evaluation_step = make_evaluation_step(structure_of(layout.evaluation_model(MODEL)), 0, None, packed=True)
    weights = np.ones((4, 24), np.float32)
    held_out = evaluation_step(evaluation_params(state), *layout.place_whole((TOKENS[0], weights)))
    return Trained(jax.tree.map(np.asarray, measured), state, float(held_out), compiled.as_text() or "")


class Trained(NamedTuple):
    measured: list[Any]
    state: Any
    held_out: float
    text: str


@pytest.fixture(scope="module")
def on_one_device():
    with jax.numpy_dtype_promotion("standard"):
        return trained(ONE_DEVICE)


def test_data(on_one_device):
    got = trained(layout_of("data=4"))
    assert_same_training(got, on_one_device)
    assert "all-reduce" in got.text
    assert not MOVED.findall(got.text)


def test_data_and_fsdp_and_tensor(on_one_device, tmp_path):
    layout = layout_of("data=2,fsdp=2,tensor=2")
    got = trained(layout)
    assert_same_training(got, on_one_device)
    # A state that comes out of a step lies as one that goes in: divided.
    for leaf, sharding in zip(jax.tree.leaves(got.state), jax.tree.leaves(layout.of_state(got.state)), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    for tree in (got.state.params, got.state.optimizer, got.state.ema):
        leaves = jax.tree.leaves(tree)
        whole, part = sum(x.size for x in leaves), sum(x.addressable_data(0).size for x in leaves)
        assert part < 0.3 * whole  # a quarter, and norms and positions besides
    with Checkpoints(tmp_path, 1, {}) as checkpoints:
        checkpoints.save(got.state, STEPS)
    restored = restore(tmp_path / str(STEPS), got.state, identity(TrainConfig()))
    for leaf, saved in zip(jax.tree.leaves(restored), jax.tree.leaves(got.state), strict=True):
        assert leaf.sharding.is_equivalent_to(saved.sharding, leaf.ndim)
        np.testing.assert_array_equal(leaf, saved)
    # Parameters are gathered, and the stream where its width was divided; never q, k, v or what plans are made of.
    heads = 4 // 2
    for _, shape, kind in MOVED.findall(got.text):
        assert f"24,{heads}" not in shape, (shape, kind)


def test_context_by_ring(on_one_device):
    moved = moved_by_context("ring", on_one_device)
    # Keys and values go round, a part at a time; only the gradient of learned positions, in four chunks, is gathered.
    assert "2,2,2,12,8" in moved["collective-permute"]  # k and v, of two sequences and heads, in slot order
    assert moved.keys() == {"collective-permute", "all-gather"}
    assert moved["all-gather"] == ["1,4,6,32"]


def test_context_by_gathering(on_one_device):
    moved = moved_by_context("gather", on_one_device)
    # Of one device's sequences and heads k and v in each of three layers, once; buckets and keep masks; and positions.
    assert moved["all-gather"].count("2,24,2,8") == moved["reduce-scatter"].count("2,12,2,8") == 3 * 2
    assert {*moved["all-gather"]} == {"2,24,2,8", "2,24,1", "2,24,2", "1,4,6,32"}
    assert {*moved["reduce-scatter"]} == {"2,12,2,8"}
    assert {*moved["collective-permute"]} == {"1,3,32"}  # chunks of learned positions
    assert "all-to-all" not in moved


def moved_by_context(exchange, on_one_device):
    got = trained(layout_of("data=2,context=2,tensor=2", exchange=exchange))
    assert_same_training(got, on_one_device)
    moved = defaultdict(list)
    for _, shape, kind in MOVED.findall(got.text):
        moved[kind].append(shape)
    return moved


@pytest.fixture
def in_zigzag():
    """A model of dense layers over divided sequences, and one with its parameters over whole ones."""
    dense = dataclasses.replace(MODEL, attention=Dense())
    configs = layout_of("context=2").training_model(dense), dense
    return [Transformer(config, rngs=nnx.Rngs(0)) for config in configs]


def test_learned_positions_in_a_zigzag(in_zigzag):
    """Laid out without a scatter in the gradient: XLA on GPUs gets those wrong where micro-batches are summed."""
    divided, whole = in_zigzag
    tokens = jnp.asarray(TOKENS[0, :2, :24] % 60)
    np.testing.assert_array_equal(divided.embed(to_zigzag(tokens, 2)), to_zigzag(whole.embed(tokens), 2))

    structure, positions, others = nnx.split(divided, nnx.PathContains("positions"), ...)
    embedded = lambda positions: nnx.merge(structure, positions, others).embed(tokens).sum()
    found = primitives(jax.make_jaxpr(jax.grad(embedded))(positions))
    assert not [name for name in found if "scatter" in name]


def test_prefill_takes_tokens_in_order(in_zigzag):
    tokens = jnp.asarray(TOKENS[0, :2, :5] % 60)
    key = jax.random.key(0)
    divided, whole = (prefill(model, tokens, init_cache(model, 2, 24, key=key))[0] for model in in_zigzag)
    np.testing.assert_array_equal(divided, whole)


def test_a_sequence_that_cannot_be_divided(in_zigzag):
    divided, _ = in_zigzag
    with pytest.raises(ValueError, match="over 2 devices in a zigzag must be a multiple of 4 long, got 6"):
        divided.hidden(jnp.zeros((1, 6), jnp.int32), key=jax.random.key(0))


def test_pmap(on_one_device):
    assert_same_training(trained(layout_of("data=4", "pmap")), on_one_device)


def assert_same_training(got, expected):
    """To the rounding of float32 sums in another order, which Adam's division lets grow."""
    for step, of_one in zip(got.measured, expected.measured, strict=True):
        for x, y in zip(step, of_one, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5)
    assert got.held_out == pytest.approx(expected.held_out, rel=1e-5)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("data=16", "takes 16 devices, there are 8"),
        ("rows=2", "expected AXIS=DEVICES"),
        ("data=2,data=2", "expected AXIS=DEVICES"),
        ("data=0", "expected AXIS=DEVICES"),
        ("data=3", "--batch-size 4 cannot be divided by 3"),
        ("tensor=8", "--model.heads 4 cannot be divided by 8"),
        ("fsdp=2,data=4", "--batch-size 4 cannot be divided by 8"),
        ("context=3", "--length 2048 cannot be divided by 6"),
    ],
)
def test_meshes_that_cannot_be(mesh, message):
    with pytest.raises(ConfigError, match=message):
        layout_of(mesh)


def test_kinds_that_take_whole_sequences():
    of_kind = lambda kind, **changes: ModelConfig(attention=(kind,), window=8, **changes)
    for model, message in ((of_kind("window"), "--model.sinks 0"), (of_kind("block_top_k"), "choose another kind")):
        with pytest.raises(ConfigError, match=message):
            make_layout(dataclasses.replace(SETTINGS, mesh="context=2", model=model))
    make_layout(dataclasses.replace(SETTINGS, mesh="context=2", model=of_kind("window", sinks=0)))


def test_a_vocabulary_that_cannot_be_divided_is_whole():
    layout = make_layout(dataclasses.replace(SETTINGS, mesh="tensor=3", model=ModelConfig(width=48, heads=3)))
    division = lambda size: layout.of_state({"embedding": np.zeros((size, 6))})["embedding"].spec
    assert division(320)[0] is None
    assert division(384)[0] == "tensor"


@pytest.mark.parametrize(
    ("mesh", "parts"), [(None, 1), ("data=4", 4), ("data=2,fsdp=2,tensor=2", 4), ("data=2,context=2,tensor=2", 2)]
)
def test_the_model_knows_how_a_batch_is_divided(mesh, parts):
    assert layout_of(mesh).training_model(MODEL).batch_parts == parts


def test_pmap_takes_data_alone():
    with pytest.raises(ConfigError, match="a mesh of data alone"):
        layout_of("data=2,tensor=2", "pmap")


def test_by_default_sequences_over_all_devices():
    assert str(layout_of(None)) == "one device"  # four sequences, eight devices
    eight = dataclasses.replace(SETTINGS, batch=BatchConfig(size=16))
    assert str(make_layout(eight)) == "data 8, by jit"
