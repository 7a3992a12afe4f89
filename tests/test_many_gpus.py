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
    assert_as_on_one_device(
        function, in_dtype(dtype, arrays(8, 4)), ("data", "tensor"), AxisType.Auto, shape=(2, GPUS // 2)
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_one_key_head_for_all(dtype):
    moves = ["all-reduce"] if GPUS == 4 else []
    assert_as_on_one_device(
        hashed, in_dtype(dtype, arrays(4, 1)), ("data", "tensor"), AxisType.Auto, moves=moves, shape=(2, GPUS // 2)
    )


def in_dtype(dtype, operands):
    return [x.astype(dtype) if x.dtype == jnp.float32 else x for x in operands]


@pytest.fixture(scope="module")
def on_one_gpu():
    return in_float32(ONE_DEVICE)


@pytest.mark.parametrize("mesh", [f"data={GPUS}", f"fsdp={GPUS}", f"tensor={GPUS}", f"context={GPUS}"])
def test_training(mesh, on_one_gpu):
    assert_same_training(in_float32(layout_of(mesh)), on_one_gpu)


def test_training_by_pmap(on_one_gpu):
    assert_same_training(in_float32(layout_of(f"data={GPUS}", "pmap")), on_one_gpu)


def in_float32(layout):
    with jax.numpy_dtype_promotion("standard"), jax.default_matmul_precision("highest"):
        return trained(layout)
