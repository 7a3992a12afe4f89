"""Meshes of GPUs: the numbers of one, and nothing moves that need not: `python -m pytest -m gpu`, where they are."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

from tests.test_mesh import ONE_DEVICE, assert_same_training, layout_of, trained
from tests.test_partitioning import PLANNED, arrays, assert_as_on_one_device, hashed

GPUS = jax.device_count()

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS not in (2, 4), reason="needs two or four GPUs")]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("function", PLANNED)
def test_nothing_moves(function, dtype):
    assert_as_on_one_gpu(function, dtype, arrays(8, 4))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_one_key_head_for_all(dtype):
    assert_as_on_one_gpu(hashed, dtype, arrays(4, 1), moves=["all-reduce"] if GPUS == 4 else [])


def assert_as_on_one_gpu(function, dtype, operands, **options):
    operands = [x.astype(dtype) if x.dtype == jnp.float32 else x for x in operands]
    over, shape = ("data", "tensor"), (2, GPUS // 2)
    assert_as_on_one_device(function, operands, over, AxisType.Auto, shape=shape, **options)


@pytest.fixture(scope="module")
def on_one_gpu():
    return in_float32(ONE_DEVICE)


@pytest.mark.parametrize(
    ("axis", "options"),
    [
        ("data", {}),
        ("fsdp", {}),
        ("tensor", {}),
        ("context", {"exchange": "gather"}),
        ("context", {"exchange": "ring"}),
        ("data", {"parallel": "pmap"}),
    ],
    ids=["data", "fsdp", "tensor", "context-gather", "context-ring", "pmap"],
)
def test_training(axis, options, on_one_gpu):
    assert_same_training(in_float32(layout_of(f"{axis}={GPUS}", **options)), on_one_gpu)


def in_float32(layout):
    with jax.numpy_dtype_promotion("standard"), jax.default_matmul_precision("highest"):
        return trained(layout)
