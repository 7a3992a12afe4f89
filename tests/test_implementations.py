"""Which implementation runs where, and what is said where one cannot."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparse_flash_jax as sfj
from sparse_flash_jax.kernels import implementations
from sparse_flash_jax.kernels.config import Blocks, Config
from sparse_flash_jax.kernels.implementations import IMPLEMENTATIONS, check_implementation, pick_implementation
from sparse_flash_jax.kernels.interval import interval_attention
from tests.contract import RUNS, inputs

CPU = jax.devices("cpu")[0]


@pytest.fixture
def device(monkeypatch):
    """Puts a device of a kind and compute capability in the place of the default one."""

    def put(kind, capability):
        stand_in = SimpleNamespace(device_kind=kind, compute_capability=capability)
        monkeypatch.setattr(implementations, "_default_device", lambda: stand_in)

    return put


def test_none_picks_what_runs_here():
    q, k, v, *_ = (jnp.swapaxes(x, 1, 2) for x in inputs("float32"))
    picked = pick_implementation(q.shape[-1])
    np.testing.assert_array_equal(
        interval_attention(q, k, v, RUNS["narrow"])[0],
        interval_attention(q, k, v, RUNS["narrow"], implementation=picked)[0],
    )


@pytest.mark.parametrize(
    ("kind", "capability", "head_dim", "picked"),
    [
        ("NVIDIA H100 80GB HBM3", "9.0", 64, "triton"),
        ("NVIDIA A100-SXM4-40GB", "8.0", 256, "triton"),
        ("NVIDIA A100-SXM4-40GB", "8.0", 257, "xla"),
        ("Tesla V100-SXM2-16GB", "7.0", 64, "xla"),
        ("AMD Instinct MI300X", "gfx942", 64, "xla"),
    ],
)
def test_none_picks_for_the_device(device, kind, capability, head_dim, picked):
    device(kind, capability)
    assert pick_implementation(head_dim) == picked


@pytest.mark.parametrize("default", [CPU, "cpu"], ids=["a device", "a platform"])
def test_none_picks_for_the_device_chosen_as_default(default):
    with jax.default_device(default):
        assert pick_implementation(64) == "xla"


def test_triton_without_such_a_gpu(device):
    with jax.default_device(CPU), pytest.raises(NotImplementedError, match=r"'triton' needs .* 8\.0 .* device is cpu;"):
        check_implementation("triton", 64)
    device("Tesla V100-SXM2-16GB", "7.0")
    with pytest.raises(NotImplementedError, match="default device is Tesla V100-SXM2-16GB; use implementation='xla'"):
        check_implementation("triton", 64)


def test_triton_with_a_head_dim_too_large(device):
    device("NVIDIA H100 80GB HBM3", "9.0")
    check_implementation("triton", 256)
    with pytest.raises(NotImplementedError, match="'triton' has head dims up to 256, got 288; use"):
        check_implementation("triton", 288)


def test_a_named_implementation_never_falls_back(device):
    device("Tesla V100-SXM2-16GB", "7.0")
    q = jnp.ones((1, 8, 1, 16))
    for implementation in ("mosaic", "triton"):
        assert implementation in IMPLEMENTATIONS
        with pytest.raises(NotImplementedError, match=f"{implementation}.*xla"):
            sfj.sparse_attention(q, q, q, sfj.causal(8), implementation=implementation)


def test_unknown_implementation():
    with pytest.raises(ValueError, match=r"one of .*mosaic.*triton.*xla.*got .cudnn"):
        check_implementation("cudnn", 64)


def test_interpreted_on_any_device():
    block = Blocks(16, 16)
    config = Config(block, block, block, interpret=True)
    with jax.default_device(CPU):
        check_implementation("triton", 64, config)
