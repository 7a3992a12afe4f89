"""The reference against a float64 oracle that loops: the judge of the judge."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_flash_jax.reference import reference_attention
from tests import definition, oracle
from tests.budget import truth
from tests.cases import BY_NAME, CASES

# Float32 sums of up to 1024 products: measured 5.4e-7 of the largest value at worst, in dk.
TOLERANCE = 2e-6
JUDGED = [case for case in CASES if case.dtype == "float32"]


def by_loops(inputs, seen, scale=None):
    return oracle.attention(inputs.q, inputs.k, inputs.v, seen, inputs.do, inputs.dlse, scale)


@pytest.mark.parametrize("case", JUDGED, ids=str)
def test_outputs_and_gradients(case):
    inputs, seen = case.inputs(), definition.visible(case)
    got = jax.jit(truth)(inputs, seen)
    expected = by_loops(inputs, seen)
    for name in expected._fields:
        x, exact = np.asarray(getattr(got, name)), getattr(expected, name)
        np.testing.assert_array_equal(np.isfinite(x), np.isfinite(exact), name)
        finite = np.isfinite(exact)
        largest = max(1.0, np.abs(exact[finite]).max(initial=0))
        np.testing.assert_allclose(x[finite], exact[finite], rtol=0, atol=TOLERANCE * largest, err_msg=name)
        assert (x[finite] == 0)[exact[finite] == 0].all(), f"{name} is not exactly 0 where it should be"


def test_scale():
    case = BY_NAME["B2-T63-N4-K2-H32-hash16-f32"]
    inputs, seen = case.inputs(), definition.visible(case)
    got = jax.jit(lambda inputs, seen: truth(inputs, seen, 0.7))(inputs, seen)
    expected = by_loops(inputs, seen, scale=0.7)
    for name in ("o", "dq", "dk", "dv"):
        exact = getattr(expected, name)
        atol = TOLERANCE * np.abs(exact).max()
        np.testing.assert_allclose(getattr(got, name), exact, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_short_dtypes_round_once(dtype):
    case = BY_NAME["B2-T63-N4-K2-H32-hash16-f32"]
    q, k, v = (x.astype(dtype) for x in case.inputs()[:3])
    seen = jnp.asarray(definition.visible(case))
    o, lse = reference_attention(q, k, v, seen, return_residual=True)
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    exact, exact_lse = reference_attention(q, k, v, seen, return_residual=True)
    assert o.dtype == dtype
    assert lse.dtype == jnp.float32
    np.testing.assert_array_equal(o, exact.astype(dtype))
    np.testing.assert_array_equal(lse, exact_lse)


def test_mask_axes_broadcast():
    case = BY_NAME["B2-T63-N4-K2-H32-causal-f32"]
    q, k, v = case.inputs()[:3]
    seen = jnp.asarray(definition.visible(case))
    np.testing.assert_array_equal(reference_attention(q, k, v, seen[:1, :1]), reference_attention(q, k, v, seen))


def test_large_scores_do_not_overflow():
    case = BY_NAME["B2-T63-N4-K2-H32-causal-f32"]
    inputs = case.inputs()
    inputs = inputs._replace(q=100 * inputs.q)
    got = jax.jit(truth)(inputs, definition.visible(case))
    for name in got._fields:
        assert np.isfinite(getattr(got, name)).all(), name
