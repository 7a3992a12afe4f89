"""Hopper kernels that read q, k and v by position, where a plan sorts nothing: no copies in slot order are made."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import sparse_flash_jax as sfj
from sparse_flash_jax.kernels import mosaic
from sparse_flash_jax.kernels.config import (
    Config,
    HopperBlocks,
    mosaic_config,
    mosaic_config_beyond_runs,
    within_blocks,
)
from sparse_flash_jax.kernels.implementations import reads_in_place
from tests.budget import assert_within_budget, attend, judges
from tests.cases import Inputs
from tests.gpus import H100, lowered, mesh_of, on, passes, put_device
from tests.jaxprs import calls

LENGTH = 256
CONFIGS = {
    "two_kernels": Config(
        HopperBlocks(2, 128, 2, turns=True, overlap=True),
        HopperBlocks(2, 64, 2),
        HopperBlocks(2, 64, 2, rows_in_registers=True, tiles=2),
        interpret=True,
    ),
    "one_kernel": Config(
        HopperBlocks(2, 64, 2),
        HopperBlocks(2, 64, 2),
        HopperBlocks(2, 64, 3, rows_in_registers=True),
        fused=True,
        interpret=True,
    ),
}


def drawn(length=LENGTH, heads=2, key_heads=1, head_dim=64):
    rng = np.random.default_rng(0)
    q, k, v, do = (rng.standard_normal((1, length, x, head_dim)) for x in (heads, key_heads, key_heads, heads))
    q, k, v, do = (jnp.asarray(x, "bfloat16") for x in (q, k, v, do))
    return Inputs(q, k, v, do, jnp.asarray(rng.standard_normal((1, length, heads)), jnp.float32))


def blocks(length, block, heads=2):
    count = length // block
    listed = np.random.default_rng(1).random((1, heads, count, count)) < 0.5
    return sfj.block_sparse(jnp.asarray(listed | np.eye(count, dtype=bool)), block)


@pytest.mark.parametrize("kernels", CONFIGS)
def test_interpreted(kernels):
    """Blocks of 64 rows walk lists of their own, two in a tile."""
    plan = blocks(LENGTH, 64) if kernels == "two_kernels" else sfj.causal(LENGTH, window=100)
    got = attend(drawn(), plan, "mosaic", CONFIGS[kernels])
    assert_within_budget(got, *judges(drawn(), plan.mask()))


def test_nothing_is_moved():
    moves = lambda plan, inputs, kernels="two_kernels": [
        calls(jax.make_jaxpr(lambda x: attend(x, plan, "mosaic", CONFIGS[kernels]))(inputs), name)
        for name in ("_to_slots", "to_positions")
    ]
    assert moves(sfj.causal(LENGTH), drawn()) == [0, 0]
    assert moves(sfj.causal(LENGTH), drawn(), "one_kernel") == [0, 1], "dq, which is summed by slot"
    assert moves(sfj.causal(LENGTH - 1), drawn(LENGTH - 1)) == [1, 2], "interpreted, kernels write by slot"
    ids = jnp.zeros((1, LENGTH, 2), jnp.int32)
    assert moves(sfj.hash_sparse(ids, ids[:, :, :1]), drawn()) == [1, 2]


@pytest.mark.parametrize(
    ("lengths", "head_dim", "expected"),
    [((256, 384), 64, True), ((256, 320), 64, False), ((250, 256), 64, False), ((256, 256), 80, False)],
)
def test_whole_tiles_alone(lengths, head_dim, expected):
    config = mosaic_config(64, long_runs=True)  # with columns of 128
    assert reads_in_place("mosaic", config, lengths, head_dim) is expected
    assert not reads_in_place("xla", config, lengths, head_dim)


@pytest.mark.parametrize(("head_dim", "listed"), [(128, False), (192, False), (192, True)])
def test_kernels_lower_for_cuda(head_dim, listed):
    def by_position(x):
        batch, heads, length, *size = x.shape
        return jax.ShapeDtypeStruct((batch, length, heads, *size), x.dtype) if size else x

    if listed:
        config = mosaic_config_beyond_runs(head_dim, long_runs=True, blocks=(64, 64))
        config, plan = within_blocks(config, 64, 64, head_dim), blocks(LENGTH, 64, 4)
    else:
        config, plan = mosaic_config(head_dim, long_runs=True), sfj.causal(LENGTH)
    with on(H100):
        for kernel, operands in passes(mosaic, "bfloat16", head_dim, plan.runs, LENGTH, fused=config.fused):
            operands = [x if isinstance(x, tuple) else by_position(x) for x in operands]
            kernel = functools.partial(kernel, scale=0.1, config=config, in_place=True)
            assert "mosaic_gpu" in lowered(kernel, *operands)


@pytest.mark.parametrize("how", ["vmap", "shard_map"])
def test_transformed_calls_lower_for_cuda(how, monkeypatch):
    put_device(monkeypatch)
    x = jax.ShapeDtypeStruct((8, LENGTH, 2, 64), "bfloat16")
    if how == "vmap":
        call, x = jax.vmap(gradients), jax.ShapeDtypeStruct((4, 2, *x.shape[1:]), x.dtype)
    else:
        axes = PartitionSpec("data")
        call = jax.shard_map(gradients, mesh=mesh_of(H100), in_specs=axes, out_specs=axes)
    with on(H100):
        text = lowered(call, x, x, x, x)
    assert "interval_attention_dqkv" in text
    assert 'name = "to_slots"' not in text


def gradients(q, k, v, do):
    return jax.vjp(lambda q, k, v: sfj.sparse_attention(q, k, v, sfj.causal(LENGTH)), q, k, v)[1](do)


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["causal", "window", "blocks64", "blocks128", "sinks"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_compiled(head_dim, pattern):
    length, heads = 1024, 4
    plan = {
        "causal": lambda: sfj.causal(length),
        "window": lambda: sfj.causal(length, window=100),
        "blocks64": lambda: blocks(length, 64, heads),
        "blocks128": lambda: blocks(length, 128, heads),
        "sinks": lambda: sfj.sinks_and_window(length, 4, 200),
    }[pattern]()
    inputs = drawn(length, heads, 2, head_dim)
    assert_within_budget(attend(inputs, plan), *judges(inputs, plan.mask()))
