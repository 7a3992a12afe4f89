"""What every implementation of interval attention must do; each test module of one subclasses it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_flash_jax.kernels.config import Blocks, Config
from sparse_flash_jax.kernels.interval import interval_attention
from sparse_flash_jax.kernels.tiles import Runs
from tests.budget import Results, assert_within_budget, judges, with_gradients
from tests.cases import Inputs

BATCH, HEADS, KEY_HEADS, QUERIES, KEYS, HEAD_DIM = 2, 2, 1, 90, 75, 8


def runs_of(k_start: np.ndarray, k_stop: np.ndarray, keys: int = KEYS) -> Runs:
    """Runs and their transpose, from monotone bounds [B N T]."""
    slot = np.arange(keys)
    seen = (k_start[..., None] <= slot) & (slot < k_stop[..., None])
    before = (k_stop[..., None] <= slot).sum(axis=-2)  # queries whose run ends before the key
    until = before + seen.sum(axis=-2)
    return Runs._make([*(jnp.asarray(x, jnp.int32) for x in (k_start, k_stop, before, until)), None, None])


def random_runs(rng: np.random.Generator, widest: int, heads: int = HEADS) -> Runs:
    """Monotone runs of up to about `widest` keys, some of them empty."""
    stop = np.sort(rng.integers(0, KEYS + 1, (BATCH, heads, QUERIES)), axis=-1)
    start = np.maximum.accumulate(np.maximum(stop - rng.integers(0, widest, stop.shape), 0), axis=-1)
    return runs_of(np.minimum(start, stop), stop)


def sections() -> Runs:
    """Runs of the first 20 queries begin late and those of the last end late: masked, full and masked tiles in turn."""
    query = np.broadcast_to(np.arange(QUERIES), (BATCH, HEADS, QUERIES))
    return runs_of(query // 9, np.minimum(KEYS, 55 + query // 4))


def empty() -> Runs:
    zeros = np.zeros((BATCH, HEADS, QUERIES), int)
    return runs_of(zeros, zeros)


RUNS = {
    "narrow": random_runs(np.random.default_rng(0), 10),
    "wide": random_runs(np.random.default_rng(1), 200),
    "sections": sections(),
    "empty": empty(),
}


def beside(first: str, second: str) -> Runs:
    """Runs of one kind in the first batch entry, of another in the second."""
    return jax.tree.map(lambda x, y: jnp.concatenate([x[:1], y[1:]]), RUNS[first], RUNS[second])


CONFIGS = {
    "small": Config(Blocks(8, 8), Blocks(8, 8), Blocks(8, 8)),
    "each_pass_its_own": Config(Blocks(16, 8), Blocks(8, 32), Blocks(32, 16)),
    "past_the_end": Config(Blocks(128, 128), Blocks(64, 128), Blocks(128, 32)),
}


def inputs(dtype: str) -> Inputs:
    """[B T N H] as everywhere in the tests, though the kernels want heads first."""
    rng = np.random.default_rng(7)
    queries, keys = (BATCH, QUERIES, HEADS, HEAD_DIM), (BATCH, KEYS, KEY_HEADS, HEAD_DIM)
    q, k, v, do = (jnp.asarray(rng.standard_normal(s), dtype) for s in (queries, keys, keys, queries))
    return Inputs(q, k, v, do, jnp.asarray(rng.standard_normal(queries[:3]), jnp.float32))


def judged(inputs: Inputs, runs: Runs, scale: float | None = None) -> tuple[Results, Results]:
    """The judges of the pairs that the runs show."""
    slot = np.arange(KEYS)
    start, stop = (np.asarray(x)[..., None] for x in (runs.k_start, runs.k_stop))
    mask = (start <= slot) & (slot < stop)
    return judges(inputs, np.repeat(mask, HEADS // mask.shape[1], axis=1), scale)


@functools.partial(jax.jit, static_argnames=("implementation", "config", "scale"))
def attended(inputs: Inputs, runs: Runs, *, implementation: str, config: Config, scale: float | None) -> Results:
    def attention(q, k, v):
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
        o, lse = interval_attention(q, k, v, runs, scale=scale, implementation=implementation, config=config)
        return jnp.swapaxes(o, 1, 2), jnp.swapaxes(lse, 1, 2)

    return with_gradients(attention, inputs)


class IntervalContract:
    """Subclasses name the implementation, its dtypes (the first is tested most), and tiles under `CONFIGS`' names."""

    implementation: str
    configs = CONFIGS
    dtypes = ("float32", "float16", "bfloat16")

    def run(self, inputs, runs, config, scale=None):
        options = {"implementation": self.implementation, "config": self.configs[config], "scale": scale}
        return attended(inputs, runs, **options)

    @pytest.mark.parametrize("config", CONFIGS)
    def test_every_kind_of_run(self, config):
        drawn = inputs(self.dtypes[0])
        for kinds in (("narrow", "sections"), ("empty", "wide")):
            runs = beside(*kinds)
            got = self.run(drawn, runs, config)
            try:
                assert_within_budget(got, *judged(drawn, runs))
            except AssertionError as error:
                error.add_note(f"runs: {kinds}")
                raise

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_short_dtypes(self, dtype):
        if dtype not in self.dtypes[1:]:
            pytest.skip(f"{self.implementation} has no {dtype}, or is tested with it throughout")
        drawn, runs = inputs(dtype), beside("narrow", "sections")
        assert_within_budget(self.run(drawn, runs, "each_pass_its_own"), *judged(drawn, runs))

    @pytest.mark.parametrize("scale", [0.0, 0.003, -0.7])
    def test_any_scale(self, scale):
        """Runs that are empty beside others are where a hidden score could pass for the largest."""
        drawn, runs = inputs(self.dtypes[0]), RUNS["narrow"]
        assert_within_budget(self.run(drawn, runs, "small", scale), *judged(drawn, runs, scale))

    def test_heads_may_share_runs(self):
        drawn, runs = inputs(self.dtypes[0]), random_runs(np.random.default_rng(2), 30, heads=1)
        assert_within_budget(self.run(drawn, runs, "small"), *judged(drawn, runs))

    def test_batch_may_share_runs(self):
        drawn, runs = inputs(self.dtypes[0]), jax.tree.map(lambda x: x[:1], RUNS["narrow"])
        assert_within_budget(self.run(drawn, runs, "small"), *judged(drawn, runs))

    def test_empty_runs_give_exact_zeros(self):
        got = self.run(inputs(self.dtypes[0]), RUNS["empty"], "small")
        assert np.isneginf(got.lse).all()
        for name in ("o", "dq", "dk", "dv"):
            assert not np.asarray(getattr(got, name)).any(), name
