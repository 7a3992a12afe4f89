"""Which implementation runs where, and what is said where one cannot."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparse_flash_jax as sfj
from sparse_flash_jax.kernels import implementations, rows
from sparse_flash_jax.kernels.config import Blocks, Config, HopperBlocks, triton_config
from sparse_flash_jax.kernels.implementations import (
    IMPLEMENTATIONS,
    check_implementation,
    counting_kernels,
    hashing_kernel,
    pick_implementation,
)
from sparse_flash_jax.kernels.interval import interval_attention
from sparse_flash_jax.kernels.rows import row_kernels
from tests.contract import RUNS, inputs
from tests.gpus import put_device

CPU = jax.devices("cpu")[0]
PASSES = ("forward", "dq", "dkv")


@pytest.fixture
def device(monkeypatch):
    return functools.partial(put_device, monkeypatch)


def test_none_picks_what_runs_here():
    q, k, v, *_ = (jnp.swapaxes(x, 1, 2) for x in inputs("float32"))
    picked = pick_implementation(q.dtype, q.shape[-1])
    np.testing.assert_array_equal(
        interval_attention(q, k, v, RUNS["narrow"])[0],
        interval_attention(q, k, v, RUNS["narrow"], implementation=picked)[0],
    )


@pytest.mark.parametrize(
    ("kind", "capability", "dtype", "head_dim", "picked"),
    [
        ("NVIDIA H100 80GB HBM3", "9.0", "bfloat16", 64, "mosaic"),
        ("NVIDIA H100 80GB HBM3", "9.0", "float16", 256, "mosaic"),
        ("NVIDIA H100 80GB HBM3", "9.0", "float32", 64, "triton"),
        ("NVIDIA H100 80GB HBM3", "9.0", "bfloat16", 257, "xla"),
        ("NVIDIA B200", "10.0", "bfloat16", 64, "triton"),
        ("NVIDIA A100-SXM4-40GB", "8.0", "bfloat16", 256, "triton"),
        ("NVIDIA A100-SXM4-40GB", "8.0", "bfloat16", 257, "xla"),
        ("Tesla V100-SXM2-16GB", "7.0", "bfloat16", 64, "xla"),
        ("AMD Instinct MI300X", "gfx942", "bfloat16", 64, "xla"),
    ],
)
def test_none_picks_for_the_device(device, kind, capability, dtype, head_dim, picked):
    device(kind, capability)
    assert pick_implementation(dtype, head_dim) == picked


@pytest.mark.parametrize("default", [CPU, "cpu"], ids=["a device", "a platform"])
def test_none_picks_for_the_device_chosen_as_default(default):
    with jax.default_device(default):
        assert pick_implementation("float32", 64) == "xla"


def test_triton_without_such_a_gpu(device):
    with jax.default_device(CPU), pytest.raises(NotImplementedError, match=r"'triton' needs .* 8\.0 .* device is cpu;"):
        check_implementation("triton", "float32", 64)
    device("Tesla V100-SXM2-16GB", "7.0")
    with pytest.raises(NotImplementedError, match="default device is Tesla V100-SXM2-16GB; use implementation='xla'"):
        check_implementation("triton", "float32", 64)


def test_a_jax_without_triton(device, monkeypatch):
    """XLA serves what Triton's kernels did, plans and rows included."""
    device("NVIDIA H100 80GB HBM3", "9.0")
    assert counting_kernels() is not None
    assert hashing_kernel(256) is not None
    assert hashing_kernel(258) is None
    assert row_kernels("mosaic", interpret=False) is not None
    for module in (implementations, rows):
        monkeypatch.setattr(module, "has_triton", lambda: False)
    assert [pick_implementation(dtype, 64) for dtype in ("bfloat16", "float32")] == ["mosaic", "xla"]
    assert counting_kernels() is None
    assert hashing_kernel(16) is None
    assert row_kernels("mosaic", interpret=False) is None
    with pytest.raises(NotImplementedError, match="'triton' needs Pallas' Triton backend, which this JAX has not; use"):
        check_implementation("triton", "float32", 64)


def test_triton_with_a_head_dim_too_large(device):
    device("NVIDIA H100 80GB HBM3", "9.0")
    check_implementation("triton", "float32", 256)
    with pytest.raises(NotImplementedError, match="'triton' has head dims up to 256, got 288; use"):
        check_implementation("triton", "float32", 288)


def test_mosaic_without_such_a_gpu(device):
    device("NVIDIA A100-SXM4-40GB", "8.0")
    with pytest.raises(NotImplementedError, match=r"'mosaic' needs .* 9\.0, .* device is NVIDIA A100-SXM4-40GB"):
        check_implementation("mosaic", "bfloat16", 64)


def test_mosaic_with_a_dtype_or_head_dim_that_it_has_not(device):
    device("NVIDIA H100 80GB HBM3", "9.0")
    check_implementation("mosaic", "bfloat16", 256)
    with pytest.raises(NotImplementedError, match="'mosaic' takes bfloat16 and float16, got float32; use"):
        check_implementation("mosaic", "float32", 64)
    with pytest.raises(NotImplementedError, match="'mosaic' has head dims up to 256, got 288; use"):
        check_implementation("mosaic", "float16", 288)


def test_a_named_implementation_never_falls_back(device):
    device("Tesla V100-SXM2-16GB", "7.0")
    q = jnp.ones((1, 8, 1, 16))
    for implementation in ("mosaic", "triton"):
        assert implementation in IMPLEMENTATIONS
        with pytest.raises(NotImplementedError, match=f"{implementation}.*xla"):
            sfj.sparse_attention(q, q, q, sfj.causal(8), implementation=implementation)


def test_unknown_implementation():
    with pytest.raises(ValueError, match=r"one of .*mosaic.*triton.*xla.*got .cudnn"):
        check_implementation("cudnn", "float32", 64)


def test_tiles_of_another_kind():
    block = HopperBlocks(1, 64, 2)
    with pytest.raises(ValueError, match="'xla' takes a config of Blocks, got HopperBlocks"):
        check_implementation("xla", "float32", 64, Config(block, block, block))


@pytest.mark.parametrize(("block", "picked"), [(Blocks(64, 64), "triton"), (HopperBlocks(2, 64, 2), "mosaic")])
def test_none_picks_what_takes_the_tiles(device, block, picked):
    device("NVIDIA H100 80GB HBM3", "9.0")
    config = Config(block, block, block)
    check_implementation(None, "bfloat16", 64, config)
    assert pick_implementation("bfloat16", 64, config) == picked


def test_tiles_that_nothing_takes_here(device):
    device("NVIDIA A100-SXM4-40GB", "8.0")
    block = HopperBlocks(2, 64, 2)
    with pytest.raises(NotImplementedError, match=r"^implementation='mosaic' needs .* 9\.0, .* A100-SXM4-40GB\.$"):
        pick_implementation("bfloat16", 64, Config(block, block, block))


def test_interpreted_on_any_device():
    block = Blocks(16, 16)
    config = Config(block, block, block, interpret=True)
    with jax.default_device(CPU):
        check_implementation("triton", "float32", 64, config)


def test_tiles_from_a_file(device, monkeypatch, tmp_path):
    device("NVIDIA H100 80GB HBM3", "9.0")
    blocks = {"rows": 32, "columns": 16, "num_warps": 8, "num_stages": 1}
    kind = {"implementation": "triton", "dtype": "bfloat16", "long_runs": False, "fused": False}
    rows = [kind | {"head_dim": size} | dict.fromkeys(PASSES, blocks) for size in (64, 128)]
    rows[1] = rows[1] | {"dq": blocks | {"rows": 64}}
    hopper, expected = {"warpgroups": 2, "columns": 64, "num_stages": 4}, HopperBlocks(2, 64, 4)
    rows.append(kind | dict.fromkeys(PASSES, hopper) | {"implementation": "mosaic", "head_dim": 64, "fused": True})
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps({"rows": rows}))
    monkeypatch.setenv("SPARSE_FLASH_TILES", str(path))

    def chosen(head_dim, dtype="bfloat16", implementation="triton"):
        return implementations.default_config(implementation, dtype=dtype, head_dim=head_dim, runs=RUNS["narrow"])

    assert chosen(48).dq == Blocks(32, 16, 8, 1)
    assert chosen(80).dq == Blocks(64, 16, 8, 1)
    assert chosen(64, implementation="mosaic") == Config(expected, expected, expected, fused=True)
    assert chosen(256) == triton_config("bfloat16", 256, long_runs=False, capability=9.0)
    assert chosen(64, "float16") == triton_config("float16", 64, long_runs=False, capability=9.0)


@pytest.mark.parametrize("text", [None, "{", "[]", '{"rows": [{"implementation": "triton"}]}'])
def test_a_file_that_has_no_tiles_is_named(device, monkeypatch, tmp_path, text):
    device("NVIDIA H100 80GB HBM3", "9.0")
    path = tmp_path / "tiles.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv("SPARSE_FLASH_TILES", str(path))
    with pytest.raises(ValueError, match=r"SPARSE_FLASH_TILES names .*tiles\.json.*benchmarks/tune\.py"):
        implementations.default_config("triton", dtype="bfloat16", head_dim=64, runs=RUNS["narrow"])
