"""Slopes by distance (ALiBi), in whatever order a plan sorts: forward, every gradient, and none of the slopes."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparse_flash_jax as sfj
from sparse_flash_jax.kernels.alibi import penalty_by_distance
from tests import definition, patterns_beyond_runs, test_patterns_beyond_runs
from tests.budget import ROUNDING, Results, assert_within_budget, with_gradients
from tests.cases import BY_NAME, Case, Pattern, Shape, buckets, kept
from tests.gpus import assert_passes_lower, passes_with_slopes
from tests.test_attention import HASH
from tests.test_logits import INTERPRETED, SMALL

SLOPES = jnp.asarray([0.5, 0.0625, 0.0, 0.2], jnp.float32)


@functools.partial(jax.jit, static_argnames=("soft_cap", "implementation", "config"))
def attend(inputs, plan, slopes, soft_cap=None, implementation=None, config=None):
    options = {"implementation": implementation, "config": config, "return_residual": True}
    options |= {"alibi_slopes": slopes, "soft_cap": soft_cap}
    return with_gradients(lambda q, k, v: sfj.sparse_attention(q, k, v, plan, **options), inputs)


@functools.partial(jax.jit, static_argnames=("soft_cap", "query_offset"))
def truth(inputs, mask, slopes, soft_cap, query_offset):
    """The reference in float32."""
    options = {"alibi_slopes": slopes, "soft_cap": soft_cap, "query_offset": query_offset, "return_residual": True}
    inputs = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)
    return with_gradients(lambda q, k, v: sfj.reference_attention(q, k, v, mask, **options), inputs)


def judged(got, inputs, visible, slopes, soft_cap=None, query_offset=0):
    """Within a few roundings of the largest value: p, ds and outputs are rounded to the dtype."""
    exact = truth(inputs, jnp.asarray(visible), slopes, soft_cap, query_offset)
    rounding = ROUNDING if inputs.q.dtype == jnp.float32 else 4 * float(jnp.finfo(inputs.q.dtype).eps)
    off = lambda x: x + rounding * jnp.max(jnp.abs(jnp.where(jnp.isfinite(x), x, 0)))
    assert_within_budget(got, exact, Results(*map(off, exact)))


def judged_case(case, soft_cap=None, **options):
    inputs, slopes = case.inputs(), SLOPES[: case.shape.N]
    got = attend(inputs, definition.plan(case), slopes, soft_cap, **options)
    judged(got, inputs, definition.visible(case), slopes, soft_cap, case.pattern.query_offset)


NAMES = ["causal", "both_ways", "hash4_exclude_self", "qk50_capacities", "packed_hash3_qk50_window9", "key_heads_only"]


@pytest.mark.parametrize(("name", "soft_cap"), [*zip(NAMES, itertools.cycle([None, 3.0]))])
def test_as_the_reference(name, soft_cap):
    judged_case(BY_NAME[f"B2-T63-N4-K2-H32-{name}-f32"], soft_cap)


@pytest.mark.parametrize("name", ["T1-S64-N2-K1-H8-causal_offset_63", "T5-S64-N2-K1-H8-window9_offset_59"])
def test_behind_a_cache(name):
    judged_case(BY_NAME[f"B1-{name}-f32"])


BEYOND = [("blocks_all", 3.0), ("sinks_all", None)]


def judged_beyond(name, dtype, soft_cap=None, **options):
    inputs, plan = patterns_beyond_runs.inputs(dtype), test_patterns_beyond_runs.plan_of(name)
    got = attend(inputs, plan, SLOPES[:2], soft_cap, **options)
    judged(got, inputs, patterns_beyond_runs.CASES[name].visible, SLOPES[:2], soft_cap)


@pytest.mark.parametrize(("name", "soft_cap"), BEYOND)
def test_beyond_runs(name, soft_cap):
    judged_beyond(name, "float32", soft_cap)


CAPACITIES = Pattern("capacities", kept(0.5, 0.25, exact=True), query_capacity=45, key_capacity=23)


@pytest.mark.parametrize(
    ("implementation", "pattern", "soft_cap"),
    [("triton", SMALL.pattern, None), ("mosaic", CAPACITIES, 2.0)],
    ids=lambda x: getattr(x, "name", x),
)
def test_interpreted(implementation, pattern, soft_cap):
    case = Case(SMALL.shape, pattern, "float32" if implementation == "triton" else "float16")
    judged_case(case, soft_cap, implementation=implementation, config=INTERPRETED[implementation])


@pytest.mark.parametrize(
    ("implementation", "name", "dtype"),
    [("triton", "blocks_all", "float32"), ("mosaic", "blocks64_all", "bfloat16")],
)
def test_beyond_runs_interpreted(implementation, name, dtype):
    config = test_patterns_beyond_runs.INTERPRETED[implementation]
    judged_beyond(name, dtype, implementation=implementation, config=config)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("soft_cap", [None, 3.0])
@pytest.mark.parametrize("head_dim", [64, 128, 192])
@pytest.mark.parametrize(
    "pattern", [Pattern("causal"), Pattern("hash4", buckets(4)), Pattern("qk50", kept(0.5, 0.5))], ids=lambda x: x.name
)
def test_compiled(pattern, head_dim, soft_cap, dtype):
    judged_case(Case(Shape(B=2, T=300, N=4, K=2, H=head_dim), pattern, dtype), soft_cap)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["blocks64_all", "sinks_all", "prefix_all", "union_joined"])
def test_beyond_runs_compiled(name):
    judged_beyond(name, "bfloat16")


@pytest.mark.parametrize(("head_dim", "long_runs"), [(64, True), (128, False), (192, True), (256, False)])
def test_slopes_lower_for_cuda(head_dim, long_runs):
    assert_passes_lower(passes_with_slopes, head_dim, long_runs=long_runs)


def test_slopes_of_zero_change_nothing():
    inputs, plan = HASH.inputs(), definition.plan(HASH)
    for x, y in zip(attend(inputs, plan, jnp.zeros(4)), attend(inputs, plan, None), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-6)


def test_slopes_of_any_float_dtype_and_mapped():
    inputs, plan = HASH.inputs(), definition.plan(HASH)
    several = jnp.stack([SLOPES, 2 * SLOPES]).astype(jnp.bfloat16)
    got = jax.vmap(lambda slopes: attend(inputs, plan, slopes))(several)
    for i, slopes in enumerate(several.astype(jnp.float32)):
        for x, y in zip(got, attend(inputs, plan, slopes), strict=True):
            np.testing.assert_allclose(x[i], y, atol=1e-5)


def test_far_positions_are_exact():
    """A slope times a position near a million is off by 0.03, though neighbours are near."""
    first, slope = 1 << 20, np.float32(0.7)
    rows, columns = first + 77 + np.arange(8), first + np.arange(16)
    exact = float(slope) * np.abs(rows[:, None] - columns[None])
    got = penalty_by_distance(jnp.float32(slope), *(jnp.asarray(x, jnp.float32) for x in (rows, columns)))
    np.testing.assert_allclose(got, exact, rtol=2e-7)


def test_far_queries_attend_exactly():
    keys, queries, rng = 1 << 18, 3, np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, length, 1, 4), np.float32) for length in (queries, keys, keys))
    plan = sfj.causal(queries, keys, query_offset=jnp.int32(keys - queries), window=100)
    slopes = jnp.asarray([0.7], jnp.float32)
    got = sfj.sparse_attention(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), plan, alibi_slopes=slopes)
    for i in range(queries):
        seen = slice(keys - queries + i - 99, keys - queries + i + 1)
        s = k[0, seen, 0].astype(float) @ q[0, i, 0] / 2 - float(np.float32(0.7)) * np.arange(99, -1, -1)
        p = np.exp(s - s.max())
        np.testing.assert_allclose(got[0, i, 0], p @ v[0, seen, 0] / p.sum(), rtol=1e-5, atol=1e-6)


def test_unions_have_the_positions_of_their_first_plan():
    first, shifted = sfj.causal(40, window=5), sfj.causal(40, query_offset=-20)
    assert sfj.union(first, shifted).query_offset is None
    np.testing.assert_array_equal(sfj.union(shifted, first).query_offset, [[-20]])


def function_of_slopes():
    """One of slopes alone: plans are cached, and must not be made while it is traced."""
    (q, k, v, *_), plan = HASH.inputs(), definition.plan(HASH)
    return lambda slopes: sfj.sparse_attention(q, k, v, plan, alibi_slopes=slopes).sum()


@pytest.mark.parametrize("transform", [jax.grad, lambda f: jax.grad(jax.jit(f)), lambda f: jax.grad(jax.remat(f))])
def test_slopes_are_constants(transform):
    of_slopes = function_of_slopes()
    with pytest.raises(NotImplementedError, match=r"alibi_slopes are constants.*stop_gradient"):
        transform(of_slopes)(SLOPES)
    assert not transform(lambda slopes: of_slopes(jax.lax.stop_gradient(slopes)))(SLOPES).any()


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("slopes", "error", "message"),
    [
        (jnp.ones(3), ValueError, "alibi_slopes must be .* one for each of 4 heads"),
        (jnp.ones((4, 1)), ValueError, "alibi_slopes must have the axes"),
        (jnp.ones(4, jnp.int32), TypeError, "alibi_slopes must be float32"),
    ],
)
def test_errors(slopes, error, message):
    with pytest.raises(error, match=message):
        function_of_slopes()(slopes)


def test_one_kernel_for_all_gradients_takes_no_slopes():
    config = dataclasses.replace(INTERPRETED["mosaic"], fused=True)
    q, k, v = (x.astype(jnp.bfloat16) for x in HASH.inputs()[:3])
    with pytest.raises(ValueError, match=r"config.fused takes .* no slopes"):
        sfj.sparse_attention(q, k, v, definition.plan(HASH), alibi_slopes=SLOPES, config=config)
