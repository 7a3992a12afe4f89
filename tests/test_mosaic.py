"""The Hopper kernels, without a GPU: in Pallas' interpreter, which looks for races, and lowered for CUDA."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import sparse_flash_jax as sfj
from sparse_flash_jax.kernels import mosaic
from sparse_flash_jax.kernels.config import Blocks, Config, HopperBlocks, mosaic_config
from tests import definition
from tests.budget import assert_within_budget, judges, with_gradients
from tests.cases import BASE, BY_NAME, TOLD_APART, Case, Pattern, Shape, buckets, kept
from tests.contract import IntervalContract
from tests.gpus import H100, lowered, mesh_of, on, passes, passes_by_position, put_device
from tests.test_transforms import LENGTH, attended, drawn, hashed

CONFIGS = {
    "small": Config(HopperBlocks(1, 64, 2), HopperBlocks(1, 64, 2), HopperBlocks(1, 64, 2), interpret=True),
    "each_pass_its_own": Config(
        HopperBlocks(2, 64, 2, turns=True, overlap=True),
        HopperBlocks(2, 64, 3, turns=True),
        HopperBlocks(2, 64, 3, turns=True, rows_in_registers=True, tiles=2),
        interpret=True,
    ),
    "fused": Config(
        HopperBlocks(1, 64, 2),
        HopperBlocks(1, 64, 2),
        HopperBlocks(2, 64, 2, rows_in_registers=True),
        fused=True,
        interpret=True,
    ),
    "past_the_end": Config(
        HopperBlocks(1, 128, 2, tiles=2), HopperBlocks(1, 128, 1, tiles=4), HopperBlocks(2, 64, 3), interpret=True
    ),
}


class TestInterpreted(IntervalContract):
    implementation = "mosaic"
    configs = CONFIGS
    dtypes = ("bfloat16", "float16")

    def test_every_kind_of_run_with_dq_summed_by_dkv(self):
        self.test_every_kind_of_run("fused")


@pytest.fixture(autouse=True)
def no_races(capfd):
    """JAX before 0.12 prints what later versions raise."""
    yield
    assert "RACE DETECTED" not in capfd.readouterr().out


@functools.partial(jax.jit, static_argnums=2)
def interpreted(inputs, plan, config):
    def attention(q, k, v):
        return sfj.sparse_attention(q, k, v, plan, implementation="mosaic", config=config, return_residual=True)

    return with_gradients(attention, inputs)


# The interpreter is slow: as few entries and heads as tell kernels apart. Compiled, all cases run (test_gpu.py).
_AXES = {"key_heads_only": (2, 4, 2), "packed": (2, 2, 1), "broadcast_axes": (2, 2, 1)}
SMALL = [
    *(
        dataclasses.replace(case, shape=BASE._replace(B=b, N=n, K=k))
        for case in TOLD_APART
        if case.shape == BASE
        for b, n, k in [_AXES.get(case.pattern.name, (1, 2, 1))]
    ),
    *(
        dataclasses.replace(BY_NAME[name], shape=BY_NAME[name].shape._replace(N=n, K=k)).in_16_bits()
        for name, n, k in (
            ("B1-T1-N1-H1-causal-f32", 1, 1),
            ("B1-T1-S64-N2-K1-H8-causal_offset_63-f32", 2, 1),
            ("B1-T40-S70-N3-H48-hash4-f32", 2, 1),
            ("B1-T70-S40-N3-H48-hash4-f32", 2, 1),
            ("B1-T33-N6-K3-H96-qk50-f32", 4, 2),
            ("B1-T33-N4-K1-H256-hash4-f32", 2, 1),
            ("B1-T300-S270-N2-H16-hash2-f32", 2, 1),
        )
    ),
]


@pytest.mark.parametrize(("case", "long_runs"), [*zip(SMALL, itertools.cycle([True, False]))], ids=str)
def test_interpreted_cases_within_budget(case, long_runs):
    """In 16 bits whatever the case's dtype, which is all that the kernels take; with either kind of tiles by turns."""
    case = case.in_16_bits()
    inputs, plan = case.inputs(), definition.plan(case)
    config = mosaic_config(case.shape.H, long_runs=long_runs)
    got = interpreted(inputs, plan, dataclasses.replace(config, interpret=True))
    assert_within_budget(got, *judges(inputs, definition.visible(case)))


def test_row_buffers_are_used_again():
    """Five tiles of rows a program and three places for them."""
    case = Case(Shape(B=1, T=600, N=1, H=16), Pattern("hash4", buckets(4)), "bfloat16")
    inputs, plan = case.inputs(), definition.plan(case)
    block = HopperBlocks(2, 64, 2, turns=True, tiles=5)
    got = interpreted(inputs, plan, Config(block, block, block, interpret=True))
    assert_within_budget(got, *judges(inputs, definition.visible(case)))


def test_dq_summed_by_dkv_under_vmap():
    """Mapped, the kernel is one launch: the mapped axis is in the batch."""
    case = Case(Shape(B=2, T=130, N=1, H=16), Pattern("causal"), "bfloat16")
    q, k, v, do, _ = (jnp.swapaxes(x, 1, 2) for x in case.inputs())
    row, runs = jnp.ones(q.shape[:3], jnp.float32), sfj.causal(130).runs
    gradients = functools.partial(mosaic.backward, scale=0.25, config=CONFIGS["fused"])
    expected = gradients(q, k, v, runs, row, do, row)
    mapped = jax.vmap(gradients, in_axes=(0, 0, 0, None, 0, 0, 0))
    q, k, v, row, do = (x[:, None] for x in (q, k, v, row, do))
    for x, y in zip(mapped(q, k, v, runs, row, do, row), expected, strict=True):
        np.testing.assert_array_equal(x[:, 0], y)


@pytest.mark.parametrize(
    ("block", "said"),
    [
        (HopperBlocks(5, 64, 2), "1 to 4 warpgroups"),
        (HopperBlocks(2, 96, 2), "columns in 64s"),
        (HopperBlocks(2, 64, 1, overlap=True), "num_stages must be at least 2"),
    ],
)
def test_tiles_that_there_are_not(block, said):
    q = jnp.ones((1, 64, 1, 16), jnp.bfloat16)
    config = Config(block, block, block, interpret=True)
    with pytest.raises(ValueError, match=said):
        sfj.sparse_attention(q, q, q, sfj.causal(64), implementation="mosaic", config=config)


@pytest.mark.parametrize("block", [HopperBlocks(1, 64, 2), HopperBlocks(2, 128, 2), Blocks(64, 64)])
def test_tiles_that_fused_does_not_take(block):
    with pytest.raises(ValueError, match="takes as dkv a HopperBlocks of two warpgroups"):
        Config(block, block, block, fused=True)


@pytest.mark.parametrize("implementation", [None, "mosaic"])
def test_head_dims_that_fused_does_not_take(implementation):
    q = jnp.ones((1, 64, 1, 80), jnp.bfloat16)
    with pytest.raises(ValueError, match="fused takes head dims up to 64, got 80"):
        sfj.sparse_attention(q, q, q, sfj.causal(64), implementation=implementation, config=CONFIGS["fused"])


FUSED_CASES = [
    Case(Shape(B=1, T=330, N=heads, K=1, S=270, H=16), pattern, "float16")
    for heads, pattern in ((2, Pattern("causal")), (1, Pattern("bidirectional", kept(1.0, 1.0), causal=False)))
]


@pytest.mark.parametrize(("case", "shift"), [*zip(FUSED_CASES, (0.0, 2.5), strict=True)], ids=str)
def test_dq_over_several_tiles_of_keys(case, shift):
    """Also with scores about -25, of which exp(-s) is past float16: keys past the end must add nothing."""
    inputs, plan = case.inputs(), definition.plan(case)
    inputs = inputs._replace(q=inputs.q - shift, k=inputs.k + shift)
    got = interpreted(inputs, plan, CONFIGS["fused"])
    assert_within_budget(got, *judges(inputs, definition.visible(case)))


# A kernel takes a second to lower: each choice of tiles once, the dtypes by turns.
LOWERED = [
    (head_dim, long_runs, ("bfloat16", "float16")[(number + long_runs) % 2])
    for number, head_dim in enumerate((48, 64, 96, 128, 192, 256))
    for long_runs in (False, True)
]


@pytest.mark.parametrize(("head_dim", "long_runs", "dtype"), LOWERED)
def test_kernels_lower_for_cuda(dtype, head_dim, long_runs):
    runs = jax.eval_shape(lambda: sfj.causal(300)).runs
    config = mosaic_config(head_dim, long_runs=long_runs)
    for kernel, operands in passes(mosaic, dtype, head_dim, runs, fused=config.fused):
        assert "mosaic_gpu" in lowered(functools.partial(kernel, scale=0.1, config=config), *operands)


@pytest.mark.parametrize("head_dim", [48, 128, 192, 256])
def test_kernels_that_write_by_position_lower_for_cuda(head_dim):
    runs = jax.eval_shape(lambda: sfj.causal(300)).runs
    config = mosaic_config(head_dim, long_runs=False)
    for kernel, operands in passes_by_position(mosaic, "bfloat16", head_dim, runs):
        call = functools.partial(kernel, scale=0.1, config=config)
        outputs, heads = jax.tree.leaves(jax.eval_shape(call, *operands)), 2 if kernel.__name__ == "backward_dkv" else 4
        assert {x.shape for x in outputs} - {(1, 4, 300)} == {(1, 300, heads, head_dim)}
        assert "mosaic_gpu" in lowered(call, *operands)


@pytest.fixture
def hopper(monkeypatch):
    """Kernels are chosen as on a Hopper GPU."""
    put_device(monkeypatch)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("capacity", [75, 500])
def test_rows_by_kernels_are_not_padded_again(capacity):
    """Neither where fewer slots than positions are used, nor where slots are no multiple of a tile."""
    keep = jax.ShapeDtypeStruct((1, 500, 2), "bool")
    x = jax.ShapeDtypeStruct((1, 500, 2, 64), "bfloat16")

    def attend(q, k, v, do, keep):
        plan = sfj.qk_sparse(keep, keep, query_capacity=capacity, key_capacity=capacity)
        return attended(q, k, v, do, plan)

    with on(H100):
        text = lowered(attend, x, x, x, x, keep)
    assert "mosaic_gpu" in text
    assert not [line for line in text.splitlines() if "stablehlo.pad" in line and "x64xbf16>" in line]


def causally(q, k, v, do, *_):
    """Long runs: all gradients from one kernel."""
    return attended(q, k, v, do, sfj.causal(LENGTH))


def sloped(q, k, v, do, *_):
    """Long runs, and yet a kernel for dq."""
    return attended(q, k, v, do, sfj.causal(LENGTH), alibi_slopes=jnp.ones(q.shape[2], jnp.float32))


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("attend", "how"), [(hashed, "vmap"), (hashed, "shard_map"), (causally, "vmap"), (sloped, "shard_map")]
)
def test_transformed_calls_lower_for_cuda(attend, how):
    operands = drawn("bfloat16")
    if how == "vmap":
        call, operands = jax.vmap(attend), [x.reshape(4, 2, *x.shape[1:]) for x in operands]
    else:
        mesh = mesh_of(H100)
        call = jax.shard_map(attend, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"))
    with on(H100):
        text = lowered(call, *operands)
    assert "mosaic_gpu" in text
    # Rows go to slots by kernels; back they are written by those that compute them, but for the one of all gradients.
    assert 'name = "to_slots"' in text
    assert ('name = "to_positions"' in text) == (attend is causally)
    assert ("interval_attention_dqkv" in text) == (attend is causally)
