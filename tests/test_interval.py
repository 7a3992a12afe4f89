"""The gradient rule of interval attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_flash_jax.kernels.interval import RESIDUAL_NAMES, interval_attention
from tests.contract import RUNS, inputs


def heads_first():
    return [jnp.swapaxes(x, 1, 2) for x in inputs("float32")]


@pytest.mark.parametrize("through", ["o", "lse"])
def test_gradient_through_each_output_alone(through):
    """The cotangents add: what flows through o and through lse alone sums to what flows through both."""
    q, k, v, do, dlse = heads_first()
    _, vjp = jax.vjp(lambda q, k, v: interval_attention(q, k, v, RUNS["wide"]), q, k, v)
    both = vjp((do, dlse))
    alone = vjp((do, jnp.zeros_like(dlse)) if through == "o" else (jnp.zeros_like(do), dlse))
    rest = vjp((jnp.zeros_like(do), dlse) if through == "o" else (do, jnp.zeros_like(dlse)))
    for name, x, y, z in zip(("dq", "dk", "dv"), both, alone, rest, strict=True):
        np.testing.assert_allclose(x, y + z, atol=2e-5, err_msg=name)
    if through == "lse":
        assert alone[0].any()
        assert alone[1].any()
        assert not alone[2].any(), "lse does not depend on v"


def test_scale_defaults_to_one_over_root_head_dim():
    q, k, v, *_ = heads_first()
    default, named = (interval_attention(q, k, v, RUNS["wide"], scale=s)[0] for s in (None, q.shape[-1] ** -0.5))
    np.testing.assert_array_equal(default, named)


def test_residuals_are_named():
    q, k, v, *_ = heads_first()
    jaxpr = jax.make_jaxpr(jax.grad(lambda q: interval_attention(q, k, v, RUNS["wide"])[0].sum()))(q)
    for name in RESIDUAL_NAMES:
        assert f"name={name}" in str(jaxpr)
