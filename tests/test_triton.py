"""The Triton kernels: in Pallas' interpreter against the XLA loops, and lowered for CUDA. Neither needs a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

import sparse_flash_jax as sfj
from sparse_flash_jax.kernels import triton, xla
from sparse_flash_jax.kernels.config import Blocks, Config, triton_config
from sparse_flash_jax.kernels.triton import launch
from tests.contract import RUNS, inputs

GPUS = {"NVIDIA A100-SXM4-40GB": 108, "NVIDIA GeForce RTX 4090": 128, "NVIDIA H100 80GB HBM3": 132}
CONFIG = Config(Blocks(32, 16), Blocks(16, 32), Blocks(16, 32))


@functools.partial(jax.jit, static_argnums=0)
def passes(kernels, drawn, runs):
    q, k, v, do = (jnp.swapaxes(x, 1, 2) for x in drawn[:4])
    interpret = {} if kernels is xla else {"interpret": True}
    options = {"scale": 0.3, "config": CONFIG} | interpret
    o, lse = kernels.forward(q, k, v, runs, **options)
    delta = jnp.sum(o * do, axis=-1) - jnp.swapaxes(drawn.dlse, 1, 2)
    dq = kernels.backward_dq(q, k, v, runs, lse, do, delta, **options)
    return o, lse, dq, *kernels.backward_dkv(q, k, v, runs, lse, do, delta, **options)


def test_interpreted_kernels_agree_with_the_loops():
    drawn = inputs("float32")
    for name, runs in RUNS.items():
        for x, y in zip(passes(triton, drawn, runs), passes(xla, drawn, runs), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("device_kind", GPUS)
@pytest.mark.parametrize(
    ("dtype", "head_dim"), [("bfloat16", 64), ("float16", 128), ("float32", 48), ("bfloat16", 256)]
)
def test_kernels_lower_for_cuda(device_kind, dtype, head_dim):
    q, k = (jax.ShapeDtypeStruct((1, heads, 300, head_dim), dtype) for heads in (4, 2))
    row = jax.ShapeDtypeStruct((1, 4, 300), "float32")
    runs = jax.eval_shape(lambda: sfj.causal(300)).runs
    device = AbstractDevice(device_kind=device_kind, num_cores=GPUS[device_kind], platform="gpu")
    config = triton_config(dtype, head_dim, long_runs=True)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        for kernel, operands in (
            (triton.forward, (q, k, k, runs)),
            (triton.backward_dq, (q, k, k, runs, row, q, row)),
            (triton.backward_dkv, (q, k, k, runs, row, q, row)),
        ):
            traced = jax.jit(functools.partial(kernel, scale=0.1, config=config)).trace(*operands)
            assert "triton" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("dtype", "itemsize"), [("bfloat16", 2), ("float32", 4)])
@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
def test_streamed_tiles_fit_the_smallest_shared_memory(dtype, itemsize, head_dim):
    limit = 99 * 1024  # of compute capability 8.6 and 8.9, the least from 8.0 on
    for long_runs in (False, True):
        config = triton_config(dtype, head_dim, long_runs=long_runs)
        for block in (config.forward, config.dq, config.dkv):
            assert 2 * block.num_stages * block.columns * head_dim * itemsize <= limit


def test_long_tiles_start_first():
    """One bucket with half of all tokens, of 16: its tiles come first, longer by powers of two before shorter."""
    length, rows = 1024, 32
    position = np.arange(length)
    bucket = jnp.asarray(np.where(position % 2 == 0, 5, position // 2 % 16), jnp.int32)[None, :, None]
    runs = sfj.hash_sparse(bucket, bucket).runs
    order = launch.longest_first(runs.k_start, runs.k_stop, Blocks(rows, 16), batch=1, heads=1, group=1)
    assert sorted(order.tolist()) == list(range(length // rows))
    work = np.asarray(runs.k_stop[0, 0, rows - 1 :: rows] - runs.k_start[0, 0, ::rows])
    started = work[np.asarray(order)]
    assert started[0] > 2 * work.mean()
    assert (np.diff(np.floor(np.log2(np.maximum(started / work.mean(), 1)))) <= 0).all()


def test_even_tiles_stay_head_by_head():
    runs = sfj.causal(128).runs
    order = launch.longest_first(runs.k_start, runs.k_stop, Blocks(32, 32), batch=1, heads=2, group=1)
    assert order.tolist() == [3, 2, 1, 0, 7, 6, 5, 4]
