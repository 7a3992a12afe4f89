"""Rows moved by kernels are the rows moved by gathers, bit for bit; and the kernels lower for CUDA."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparse_flash_jax as sfj
from sparse_flash_jax.kernels import rows
from sparse_flash_jax.kernels.config import Blocks, Config
from sparse_flash_jax.permute import Permutation
from tests.cases import Shape, buckets
from tests.gpus import GPUS, lowered, on
from tests.test_permute import permutation

INTERPRETED = rows.RowKernels(interpret=True)
SHAPES = {  # and how many slots queries and keys have
    "gqa": (Shape(B=2, T=100, N=4, S=130, K=2, H=24), (100, 130)),
    "fewer_slots": (Shape(B=1, T=64, N=2, H=64), (40, 1)),
    "one_query": (Shape(B=2, T=1, N=3, S=70, K=1, H=5), (1, 70)),
}


@pytest.fixture(params=SHAPES)
def moved(request):
    """q, k and v, and the permutations of queries and keys; the latter are the same for all batch entries and heads."""
    shape, slots = SHAPES[request.param]
    rng = np.random.default_rng(shape.T)
    q, *of_keys = (
        jnp.asarray(rng.standard_normal((*axes, shape.H)), jnp.bfloat16)
        for axes in (shape.query_axes, shape.key_axes, shape.key_axes)
    )
    queries = permutation(slots[0], shape.B, shape.N, shape.T)
    return (q, *of_keys), queries, permutation(slots[1], 1, 1, shape.keys)


def assert_equal(got, expected):
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


def test_there_and_back(moved):
    xs, queries, keys = moved
    slotted = rows.to_slots(xs, (queries, keys, keys), None)
    assert_equal(rows.to_slots(xs, (queries, keys, keys), INTERPRETED), slotted)
    restored = rows.to_positions(slotted, (queries, keys, keys), None)
    assert_equal(rows.to_positions(slotted, (queries, keys, keys), INTERPRETED), restored)


def test_delta_on_the_way(moved):
    (q, *_), queries, _ = moved
    do = jnp.flip(q, axis=1)
    (rows_moved, delta), (expected, true_delta) = (
        rows.to_slots_with_delta(do, q, queries, by) for by in (INTERPRETED, None)
    )
    assert_equal([rows_moved], [expected])
    np.testing.assert_allclose(delta, true_delta, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("whole", [64, 128])
def test_past_the_last_slot_is_zero(moved, whole):
    (q, k, _), queries, keys = moved
    exact = rows.to_slots((q, k), (queries, keys), INTERPRETED)
    rounded = rows.to_slots((q, k), (queries, keys), INTERPRETED, whole)
    past = [(0, 0), (0, 0), (0, -exact[0].shape[2] % whole), (0, 0)]
    assert_equal(rounded, [jnp.pad(x, [*past[:2], (0, -x.shape[2] % whole), (0, 0)]) for x in exact])
    assert_equal(*(rows.to_positions(xs, (queries, keys), INTERPRETED) for xs in (rounded, exact)))
    (do, delta), (true_do, true_delta) = (
        rows.to_slots_with_delta(q, q, queries, INTERPRETED, whole=size) for size in (whole, 1)
    )
    assert_equal([do, delta], [jnp.pad(true_do, past), jnp.pad(true_delta, past[:3])])


def test_where_slots_are_positions_nothing_is_launched(moved):
    xs, queries, _ = moved
    run = lambda *xs: rows.to_slots(xs, (queries, None, None), INTERPRETED)
    assert str(jax.make_jaxpr(run)(*xs)).count("pallas_call") == 1
    assert_equal(run(*xs), rows.to_slots(xs, (queries, None, None), None))


@pytest.mark.parametrize("way", [jax.vmap, lambda f: jax.vmap(f, in_axes=(0, None))])
def test_vmap(way):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((3, 2, 70, 2, 8)), jnp.float32)
    by = permutation(70, 2, 2, 70)
    by = jax.tree.map(lambda p: jnp.stack([p] * 3), by) if way is jax.vmap else by
    there_and_back = lambda kernels: (
        lambda x, by: rows.to_positions(rows.to_slots((x,), (by,), kernels), (by,), kernels)
    )
    assert_equal(way(there_and_back(INTERPRETED))(x, by), way(there_and_back(None))(x, by))


@pytest.mark.parametrize("kind", GPUS)
@pytest.mark.parametrize(("head_dim", "length"), [(64, 640), (80, 100)])
def test_lowers_for_cuda(kind, head_dim, length):
    x = jax.ShapeDtypeStruct((2, length, 4, head_dim), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((2, 4, length), jnp.int32)
    by: Any = Permutation(*[ids] * 2)  # pyright: ignore[reportArgumentType]
    kernels = rows.RowKernels(interpret=False)

    def there_and_back(x, by):
        moved, delta = rows.to_slots_with_delta(x, x, by, kernels)
        return rows.to_positions((*rows.to_slots((x,), (by,), kernels), moved), (by, by), kernels), delta

    with on(kind):
        assert lowered(there_and_back, x, by).count("__gpu$xla.gpu.triton") == 3


@pytest.mark.parametrize("dropped", [False, True])
def test_attention_by_kernels(monkeypatch, dropped):
    """Where this JAX has no Triton, rows are gathered: the same outputs and gradients."""
    shape, rng = Shape(B=1, T=70, N=2, K=1, H=16), np.random.default_rng(0)
    arguments: dict[str, Any] = {name: jnp.asarray(x) for name, x in buckets(3)(rng, shape).items()}
    if dropped:
        keep = jnp.asarray(rng.random(shape.query_axes) < 0.7)
        arguments |= {"query_keep": keep, "query_capacity": 60}
    plan = sfj.make_plan(**arguments)
    draw = lambda axes: jnp.asarray(rng.standard_normal((*axes, shape.H)), jnp.float32)
    q, do, k, v = draw(shape.query_axes), draw(shape.query_axes), draw(shape.key_axes), draw(shape.key_axes)
    block = Blocks(rows=32, columns=32)
    config = Config(block, block, block, interpret=True)

    def run():
        jax.clear_caches()
        attend = functools.partial(sfj.sparse_attention, plan=plan, config=config, return_residual=True)
        (o, lse), pull_back = jax.vjp(lambda q, k, v: attend(q, k, v), q, k, v)
        return o, lse, *pull_back((do, jnp.where(jnp.isfinite(lse), 1.0, 0.0)))

    by_kernels = run()
    monkeypatch.setattr(rows, "has_triton", lambda: False)
    for name, got, expected in zip(("o", "lse", "dq", "dk", "dv"), by_kernels, run(), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5, err_msg=name)
