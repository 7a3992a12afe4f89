"""What is done to scores before the softmax: soft caps, and a sink beside the keys; forward and every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparse_flash_jax as sfj
from sparse_flash_jax.kernels.config import Blocks, Config, HopperBlocks
from tests import definition
from tests.budget import ROUNDING, Results, assert_within_budget
from tests.cases import BASE, BY_NAME, Case, Pattern, Shape, buckets
from tests.gpus import assert_passes_lower, passes
from tests.test_attention import HASH

SMALL = Case(Shape(B=1, T=90, N=2, K=1, H=16), Pattern("hash4_exclude_self", buckets(4), exclude_self=True))
BLOCK = HopperBlocks(2, 64, 2, turns=True)
INTERPRETED = {
    "triton": Config(Blocks(32, 16), Blocks(16, 32), Blocks(16, 16), interpret=True),
    "mosaic": Config(HopperBlocks(2, 64, 2, turns=True, overlap=True), BLOCK, BLOCK, interpret=True),
}
SINK = jnp.asarray([0.5, -2.0, 1.0, 3.0], jnp.float32)


def with_gradients(attention, inputs, sink):
    (o, lse), vjp = jax.vjp(attention, inputs.q, inputs.k, inputs.v, sink)
    dq, dk, dv, dsink = vjp((inputs.do.astype(o.dtype), inputs.dlse))
    return Results(o, lse, dq, dk, dv), dsink


@functools.partial(jax.jit, static_argnames=("soft_cap", "implementation", "config"))
def attend(inputs, plan, sink, soft_cap, implementation=None, config=None):
    def attention(q, k, v, sink):
        options = {"implementation": implementation, "config": config, "return_residual": True}
        return sfj.sparse_attention(q, k, v, plan, soft_cap=soft_cap, sink_logits=sink, **options)

    return with_gradients(attention, inputs, sink)


@functools.partial(jax.jit, static_argnames="soft_cap")
def truth(inputs, mask, sink, soft_cap):
    """The reference in float32."""

    def attention(q, k, v, sink):
        return sfj.reference_attention(q, k, v, mask, soft_cap=soft_cap, sink_logits=sink, return_residual=True)

    return with_gradients(attention, jax.tree.map(lambda x: x.astype(jnp.float32), inputs), sink)


def judged(case, sink, soft_cap, got, dtype):
    """Within a few roundings of the largest value: p, ds and outputs are rounded to the dtype."""
    inputs, mask = case.inputs(), jnp.asarray(definition.visible(case))
    exact, dsink = truth(inputs, mask, sink, soft_cap)
    rounding = ROUNDING if dtype == "float32" else 4 * float(jnp.finfo(dtype).eps)
    off = lambda x: x + rounding * jnp.max(jnp.abs(jnp.where(jnp.isfinite(x), x, 0)))
    (results, got_dsink) = got
    assert_within_budget(results, exact, Results(*map(off, exact)))
    if sink is not None:
        scale = float(jnp.abs(exact.o).sum())
        np.testing.assert_allclose(got_dsink, dsink, atol=max(1e-5, rounding * scale))


CHOICES = [(None, SINK), (3.0, None), (3.0, SINK)]


@pytest.mark.parametrize(("soft_cap", "sink"), CHOICES, ids=["sink", "cap", "both"])
@pytest.mark.parametrize("name", ["hash4_exclude_self", "causal", "qk50"])
def test_as_the_reference(name, soft_cap, sink):
    case = BY_NAME[f"B2-T63-N4-K2-H32-{name}-f32"]
    judged(case, sink, soft_cap, attend(case.inputs(), definition.plan(case), sink, soft_cap), "float32")


@pytest.mark.parametrize(("implementation", "dtype"), [("triton", "float32"), ("mosaic", "float16")])
def test_interpreted(implementation, dtype):
    case = SMALL if dtype == "float32" else SMALL.in_16_bits()
    options = {"implementation": implementation, "config": INTERPRETED[implementation]}
    got = attend(case.inputs(), definition.plan(case), SINK[:2], 2.0, **options)
    judged(case, SINK[:2], 2.0, got, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("soft_cap", "sink"), CHOICES, ids=["sink", "cap", "both"])
def test_compiled(soft_cap, sink, dtype):
    case = Case(BASE, Pattern("hash4", buckets(4)), dtype)
    judged(case, sink, soft_cap, attend(case.inputs(), definition.plan(case), sink, soft_cap), dtype)


@pytest.mark.parametrize("head_dim", [64, 128, 192])
def test_caps_lower_for_cuda(head_dim):
    assert_passes_lower(passes, head_dim, soft_cap=30.0)


def test_a_low_sink_and_a_high_cap_change_nothing():
    inputs, plan = HASH.inputs(), definition.plan(HASH)
    plain, _ = attend(inputs, plan, None, None)
    got, dsink = attend(inputs, plan, jnp.full(4, -80.0), 1e6)
    for x, y in zip(got, plain, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)
    np.testing.assert_allclose(dsink, 0.0, atol=1e-6)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"soft_cap": 0.0}, ValueError, "soft_cap must be positive"),
        ({"soft_cap": "30"}, TypeError, "soft_cap must be a static Python float"),
        ({"sink_logits": jnp.ones(3)}, ValueError, "one for each of 4 heads"),
        ({"sink_logits": jnp.ones(4, jnp.int32)}, TypeError, "sink_logits must be float32"),
    ],
)
def test_errors(options, error, message):
    q, k, v = HASH.inputs()[:3]
    with pytest.raises(error, match=message):
        sfj.sparse_attention(q, k, v, definition.plan(HASH), **options)
