"""The Triton kernels, without a GPU: in Pallas' interpreter, and lowered for CUDA."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparse_flash_jax as sfj
from sparse_flash_jax.kernels import triton
from sparse_flash_jax.kernels.config import Blocks, Config, operand_side, shared_memory, tile_bytes, triton_config
from sparse_flash_jax.kernels.interval import interval_attention
from sparse_flash_jax.kernels.triton import launch
from tests import definition
from tests.budget import assert_within_budget, judges, with_gradients
from tests.cases import TOLD_APART
from tests.contract import RUNS, IntervalContract, inputs
from tests.gpus import GPUS, H100, lowered, on, passes

CONFIGS = {
    "small": Config(Blocks(16, 16), Blocks(16, 16), Blocks(16, 16)),
    "each_pass_its_own": Config(Blocks(32, 16), Blocks(16, 32), Blocks(64, 16)),
    "past_the_end": Config(Blocks(128, 128), Blocks(64, 128), Blocks(128, 32)),
}


class TestInterpreted(IntervalContract):
    implementation = "triton"
    configs = {name: dataclasses.replace(config, interpret=True) for name, config in CONFIGS.items()}  # noqa: RUF012


@pytest.mark.gpu
class TestCompiled(IntervalContract):
    implementation = "triton"
    configs = CONFIGS


@functools.partial(jax.jit, static_argnums=2)
def interpreted(inputs, plan, config):
    def attention(q, k, v):
        return sfj.sparse_attention(q, k, v, plan, implementation="triton", config=config, return_residual=True)

    return with_gradients(attention, inputs)


@pytest.mark.parametrize("case", TOLD_APART, ids=str)
def test_interpreted_cases_within_budget(case):
    inputs, plan = case.inputs(), definition.plan(case)
    config = triton_config(case.dtype, case.shape.H, long_runs=False, capability=9.0)
    got = interpreted(inputs, plan, dataclasses.replace(config, interpret=True))
    assert_within_budget(got, *judges(inputs, definition.visible(case)))


# Each dtype on each GPU, and each head dim with each of both, in a third of all triples.
DTYPES, HEAD_DIMS = ("bfloat16", "float16", "float32"), (48, 128, 256)
LOWERED = [(kind, dtype, HEAD_DIMS[(i + j) % 3]) for i, kind in enumerate(GPUS) for j, dtype in enumerate(DTYPES)]


@pytest.mark.parametrize(("device_kind", "dtype", "head_dim"), LOWERED)
def test_kernels_lower_for_cuda(device_kind, dtype, head_dim):
    runs = jax.eval_shape(lambda: sfj.causal(300)).runs
    with on(device_kind):
        for long_runs in (False, True):
            config = triton_config(dtype, head_dim, long_runs=long_runs, capability=GPUS[device_kind][1])
            for kernel, operands in passes(triton, dtype, head_dim, runs):
                assert "__gpu$xla.gpu.triton" in lowered(functools.partial(kernel, scale=0.1, config=config), *operands)


def test_deprecation_of_the_backend_is_not_the_users_to_hear():
    q = jax.ShapeDtypeStruct((1, 1, 32, 16), "float32")
    runs = jax.eval_shape(lambda: sfj.causal(32)).runs
    with on(H100), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lowered(functools.partial(triton.forward, scale=0.1, config=CONFIGS["small"]), q, q, q, runs)
    assert not caught


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 192, 256])
@pytest.mark.parametrize("long_runs", [False, True])
def test_default_tiles_fit_the_shared_memory(dtype, head_dim, long_runs):
    itemsize = jnp.dtype(dtype).itemsize
    for capability in (8.0, 8.6, 8.9, 9.0, 12.0):
        config = triton_config(dtype, head_dim, long_runs=long_runs, capability=capability)
        for block, row_operands in ((config.forward, 1), (config.dq, 2), (config.dkv, 2)):
            assert tile_bytes(block, row_operands, operand_side(head_dim), itemsize) <= shared_memory(capability)
    assert shared_memory(8.9) == shared_memory(12.0) == 101_376


@pytest.mark.parametrize("block", [Blocks(8, 16), Blocks(48, 16), Blocks(16, 8), Blocks(16, 24)])
def test_tiles_that_the_backend_cannot_do(block):
    q, k, v, *_ = (jnp.swapaxes(x, 1, 2) for x in inputs("float32"))
    config = Config(block, block, block, interpret=True)
    with pytest.raises(ValueError, match=r"powers of two from 16 on, got Blocks\(rows="):
        interval_attention(q, k, v, RUNS["narrow"], implementation="triton", config=config)


def test_long_tiles_start_first():
    """One bucket with half of all tokens, of 16: its tiles come first, longer by powers of two before shorter."""
    length, rows = 1024, 32
    position = np.arange(length)
    bucket = jnp.asarray(np.where(position % 2 == 0, 5, position // 2 % 16), jnp.int32)[None, :, None]
    runs = sfj.hash_sparse(bucket, bucket).runs
    visited = runs.k_stop[..., rows - 1 :: rows] - runs.k_start[..., ::rows]
    order = launch.longest_first(visited, last_first=True, batch=1, heads=1, group=1)
    assert sorted(order.tolist()) == list(range(length // rows))
    work = np.asarray(visited[0, 0])
    started = work[np.asarray(order)]
    assert started[0] > 2 * work.mean()
    assert (np.diff(np.floor(np.log2(np.maximum(started / work.mean(), 1)))) <= 0).all()


@pytest.mark.parametrize(
    ("last_first", "expected"), [(True, [3, 2, 1, 0, 7, 6, 5, 4]), (False, [0, 1, 2, 3, 4, 5, 6, 7])]
)
def test_even_tiles_stay_head_by_head(last_first, expected):
    work = jnp.arange(32, 129, 32, dtype=jnp.int32)[None, None]
    order = launch.longest_first(work, last_first=last_first, batch=1, heads=2, group=1)
    assert order.tolist() == expected
