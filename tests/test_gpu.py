"""The whole of sparse attention on a GPU, compiled: `python -m pytest -m gpu`."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import sparse_flash_jax as sfj
from sparse_flash_jax.kernels.config import mosaic_config, triton_config
from sparse_flash_jax.kernels.implementations import check_implementation, pick_implementation
from tests import definition
from tests.budget import assert_within_budget, judges, with_gradients
from tests.cases import BY_NAME, CASES, Case, Pattern, Shape, buckets, half_in_one

# The transformations' tests, collected here once more: here the default device is a GPU.
from tests.test_transforms import TestDevices as TestDevices
from tests.test_transforms import drawn
from tests.test_transforms import expected as expected
from tests.test_transforms import test_remat as test_remat
from tests.test_transforms import test_scan_over_layers as test_scan_over_layers
from tests.test_transforms import test_vmap_over_a_batch_axis as test_vmap_over_a_batch_axis
from tests.test_transforms import test_vmap_with_one_plan_for_all as test_vmap_with_one_plan_for_all
from tests.test_transforms import test_vmap_with_the_same_buckets_for_all as test_vmap_with_the_same_buckets_for_all

pytestmark = pytest.mark.gpu
IMPLEMENTATIONS = ("mosaic", "triton")
CAUSAL, HASHED = Pattern("causal"), Pattern("hash4_exclude_self", buckets(4), exclude_self=True)
# Some whole tiles and a part of one, for each choice of tiles and each padding of the head dim.
SHIPPED = [
    Case(Shape(B=2, T=700, N=4, K=2, H=head_dim), pattern, dtype)
    for head_dim, pattern, dtype in itertools.product(
        (16, 48, 64, 80, 96, 128, 192, 256), (CAUSAL, HASHED), ("bfloat16", "float16", "float32")
    )
]
SKEWED = Case(Shape(B=1, T=4096, N=2, H=64), Pattern("skewed16", half_in_one(16)), "bfloat16")


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def arrays(request):
    """Of the transformations' tests; the dtype decides which kernels run."""
    return drawn(request.param)


@pytest.fixture(params=IMPLEMENTATIONS)
def attend(request):
    try:
        check_implementation(request.param, "bfloat16", 64)
    except NotImplementedError as error:
        pytest.skip(str(error))

    @jax.jit
    def run(inputs, plan):
        def attention(q, k, v):
            return sfj.sparse_attention(q, k, v, plan, implementation=request.param, return_residual=True)

        return with_gradients(attention, inputs)

    return run


ALL = (*CASES, *SHIPPED, SKEWED)


@pytest.mark.parametrize(
    ("attend", "case"),
    [
        *(("mosaic", case) for case in {str(case.in_16_bits()): case.in_16_bits() for case in ALL}.values()),
        *(("triton", case) for case in ALL),
    ],
    indirect=["attend"],
    ids=str,
)
def test_within_budget(attend, case):
    inputs, plan = case.inputs(), definition.plan(case)
    assert_within_budget(attend(inputs, plan), *judges(inputs, definition.full_mask(plan, case)))


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("alike", [False, True], ids=["each_head_its_own", "all_heads_alike"])
def test_written_by_position_or_moved_there(monkeypatch, head_dim, alike):
    case = Case(Shape(B=2, T=700, N=4, K=2, H=head_dim), HASHED, "bfloat16")
    inputs = case.inputs()
    bucket = jax.random.randint(jax.random.key(0), (1, 700, 1) if alike else (2, 700, 4), 0, 4)
    plan = sfj.hash_sparse(bucket, bucket[..., ::2], exclude_self=True)

    def attend(inputs):
        return with_gradients(lambda q, k, v: sfj.sparse_attention(q, k, v, plan, return_residual=True), inputs)

    written = jax.jit(attend)(inputs)
    assert 'name = "to_positions"' not in jax.jit(attend).lower(inputs).as_text()
    monkeypatch.setattr("sparse_flash_jax.kernels.interval.order_to_write", lambda *_: None)
    jax.clear_caches()
    moved = jax.jit(attend)(inputs)
    for name, x, y in zip(written._fields, written, moved, strict=True):
        np.testing.assert_array_equal(x, y, name)


def test_repeats_bit_by_bit(attend):
    for case in (case for case in SHIPPED if case.shape.H in (64, 128) and case.dtype == "bfloat16"):
        inputs, plan = case.inputs(), definition.plan(case)
        first = attend(inputs, plan)
        for _ in range(5):
            for name, x, y in zip(first._fields, first, attend(inputs, plan), strict=True):
                np.testing.assert_array_equal(x, y, name)


@pytest.fixture
def hopper():
    if pick_implementation("bfloat16", 64) != "mosaic":
        pytest.skip("needs a Hopper GPU")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.usefixtures("hopper")
def test_more_programs_than_run_at_a_time(causal):
    """1,536 programs, of which many wait for one that is not running yet when the first ones start."""
    case = Case(Shape(B=2, T=8192, N=12, H=64), CAUSAL, "bfloat16")
    keep = jnp.ones((1, 8192, 1), bool)
    plan, inputs = sfj.qk_sparse(keep, keep, causal=causal), case.inputs()
    fused = mosaic_config(64, long_runs=True)
    assert fused.fused

    @functools.partial(jax.jit, static_argnums=1)
    def attend(inputs, config):
        attention = functools.partial(sfj.sparse_attention, plan=plan, config=config, return_residual=True)
        return with_gradients(attention, inputs)

    got, apart = attend(inputs, fused), attend(inputs, dataclasses.replace(fused, fused=False))
    for name, x, y in zip(got._fields, got, apart, strict=True):
        x, y = (np.asarray(z, np.float32) for z in (x, y))
        assert np.linalg.norm(x - y) <= 5e-3 * np.linalg.norm(y), name
    for _ in range(5):
        np.testing.assert_array_equal(attend(inputs, fused).dq, got.dq)


@pytest.mark.usefixtures("hopper")
def test_long_runs_under_vmap_bit_by_bit():
    """Programs add to dq in the order of counters, which mapped calls must not share."""
    case = Case(Shape(B=8, T=700, N=4, K=2, H=64), CAUSAL, "bfloat16")
    plan, inputs = sfj.causal(700), case.inputs()

    def attend(inputs):
        return with_gradients(lambda q, k, v: sfj.sparse_attention(q, k, v, plan, return_residual=True), inputs)

    expected = jax.jit(attend)(inputs)
    got = jax.jit(jax.vmap(attend))(jax.tree.map(lambda x: x.reshape(4, 2, *x.shape[1:]), inputs))
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_array_equal(x.reshape(y.shape), y)


@pytest.mark.parametrize("name", ["causal", "qk50", "hash4_exclude_self", "packed_window5"])
def test_gradients_by_finite_differences(name):
    case = BY_NAME[f"B2-T63-N4-K2-H32-{name}-f32"]
    plan = definition.plan(case)
    some = jnp.asarray(definition.visible(case).any(axis=-1).swapaxes(1, 2))

    def outputs(q, k, v):
        o, lse = sfj.sparse_attention(q, k, v, plan, implementation="triton", return_residual=True)
        return o, jnp.where(some, lse, 0.0)

    check_grads(jax.jit(outputs), case.inputs()[:3], order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


def test_tf32_by_choice_alone():
    """Full float32 is the default; rounding to tf32 shows, and stays small."""
    case = BY_NAME["B2-T63-N4-K2-H32-hash16-f32"]
    inputs, plan = case.inputs(), definition.plan(case)
    exact, _ = judges(inputs, definition.visible(case))
    errors = []
    for tf32 in (False, True):
        config = triton_config("float32", 32, long_runs=False, capability=8.0)
        config = dataclasses.replace(config, tf32=tf32)
        o = sfj.sparse_attention(*inputs[:3], plan, implementation="triton", config=config)
        errors.append(float(jnp.abs(o - exact.o).max()))
    assert errors[0] < 2e-6 < errors[1] < 5e-3


def test_none_picks_a_gpu_kernel():
    hopper = jax.local_devices()[0].compute_capability == "9.0"
    assert pick_implementation("bfloat16", 64) == ("mosaic" if hopper else "triton")
    assert pick_implementation("float32", 64) == "triton"
