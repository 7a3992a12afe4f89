import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sparse_flash_jax.kernels.tiles import tile_range


@st.composite
def monotone_runs(draw):
    """Runs of some rows among `length` columns, both bounds non-decreasing; some runs are empty."""
    length, rows = draw(st.integers(1, 40)), draw(st.integers(1, 6))
    pairs = [(draw(st.integers(0, length)), draw(st.integers(0, length))) for _ in range(rows)]
    start, stop = (sorted(x) for x in zip(*((min(p), max(p)) for p in pairs), strict=True))
    return length, start, stop


@given(monotone_runs(), st.integers(1, 12))
def test_tiles_against_every_pair(drawn, block):
    length, start, stop = drawn
    tiles = tile_range(*(jnp.int32(x) for x in (start[0], stop[0], start[-1], stop[-1])), block=block)
    assert all(x.dtype == jnp.int32 for x in tiles)
    first, full_first, full_last, last = (int(x) for x in tiles)
    assert 0 <= first <= full_first <= full_last <= last
    column = np.arange(-(-length // block) * block)
    seen = (np.array(start)[:, None] <= column) & (column < np.array(stop)[:, None])
    for tile in range(column.size // block):
        pairs = seen[:, tile * block : (tile + 1) * block]
        assert not pairs.any() or first <= tile < last, f"tile {tile} has visible pairs and is not visited"
        if full_first <= tile < full_last:
            assert pairs.all(), f"tile {tile} is taken for wholly visible"
        elif first <= tile < last:
            assert not pairs.all(), f"tile {tile} is wholly visible and is masked"


def test_rows_that_see_nothing_visit_no_tile():
    tiles = tile_range(*(jnp.array([0, 16, 300], jnp.int32) for _ in range(4)), block=8)
    np.testing.assert_array_equal(tiles.start, tiles.stop)


def test_tiles_of_many_rows_at_once():
    bounds = [np.random.default_rng(seed).integers(0, 50, (3, 4)) for seed in range(4)]
    first_start, last_start, first_stop, last_stop = (jnp.asarray(x, jnp.int32) for x in np.sort(bounds, axis=0))
    together = tile_range(first_start, first_stop, last_start, last_stop, 8)
    for index in np.ndindex(3, 4):
        alone = tile_range(*(x[index] for x in (first_start, first_stop, last_start, last_stop)), block=8)
        assert [int(x[index]) for x in together] == [int(x) for x in alone]
