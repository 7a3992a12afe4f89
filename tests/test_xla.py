"""The XLA implementation meets the contract of interval attention."""

import jax
import jax.numpy as jnp
import numpy as np

from sparse_flash_jax.kernels import xla
from sparse_flash_jax.kernels.config import xla_config
from sparse_flash_jax.kernels.interval import interval_attention
from tests.contract import CONFIGS, HEADS, KEYS, QUERIES, RUNS, IntervalContract, inputs


class TestXla(IntervalContract):
    implementation = "xla"


def test_tiles_do_not_change_what_a_hidden_tile_adds():
    """One masked tile over everything and many small ones differ by rounding alone."""
    drawn, runs = inputs("float32"), RUNS["sections"]
    contract = TestXla()
    small, large = (contract.run(drawn, runs, config) for config in ("small", "past_the_end"))
    for name in small._fields:
        np.testing.assert_allclose(getattr(small, name), getattr(large, name), atol=3e-5, err_msg=name)


def test_hidden_tiles_are_skipped():
    """What lies in tiles that no run touches is never read: NaNs there do no harm."""
    q, k, v, do, _ = inputs("float32")
    keys = np.broadcast_to(np.arange(QUERIES) < 45, (2, HEADS, QUERIES))
    runs = RUNS["narrow"]._replace(
        k_start=jnp.asarray(np.where(keys, 0, 8), jnp.int32), k_stop=jnp.asarray(np.where(keys, 8, 16), jnp.int32)
    )
    q, do = (jnp.swapaxes(x, 1, 2) for x in (q, do))
    k, v = (jnp.swapaxes(x, 1, 2).at[:, :, 16:].set(jnp.nan) for x in (k, v))
    config = CONFIGS["small"]
    o, lse = xla.forward(q, k, v, runs, scale=1.0, config=config)
    delta = jnp.sum(o * do, axis=-1)
    dq = xla.backward_dq(q, k, v, runs, lse, do, delta, scale=1.0, config=config)
    for name, x in (("o", o), ("lse", lse), ("dq", dq)):
        assert np.isfinite(x).all(), name


def test_default_tiles_fit_short_sequences():
    config = xla_config(5, 3)
    for blocks in (config.forward, config.dq, config.dkv):
        assert blocks.rows == blocks.columns == 8
    assert xla_config(10_000, 10_000).forward.rows <= 512


def test_one_token():
    one = jnp.ones((1, 1, 1, 1))
    runs = jax.tree.map(lambda x: x[:1, :1, :1], RUNS["sections"])._replace(
        k_start=jnp.zeros((1, 1, 1), jnp.int32),
        k_stop=jnp.ones((1, 1, 1), jnp.int32),
        q_start=jnp.zeros((1, 1, 1), jnp.int32),
        q_stop=jnp.ones((1, 1, 1), jnp.int32),
    )
    o, lse = interval_attention(2 * one, 3 * one, 5 * one, runs)
    assert (float(o[0, 0, 0, 0]), float(lse[0, 0, 0])) == (5.0, 6.0)
    assert KEYS % 8  # or no test here would see a tile past the end of the keys
