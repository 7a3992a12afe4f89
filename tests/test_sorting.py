from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_flash_jax.sorting import count_below, invert, largest_group, sort_tokens

LENGTH = 9
IDS = np.array([-(2**31), -1, 0, 3, 2**31 - 1], np.int32)


class Drawn(NamedTuple):
    """Tokens of two heads."""

    groups: tuple[np.ndarray, ...]
    keep: np.ndarray | None
    capacity: int | None

    def sort(self):
        groups, keep = jax.tree.map(jnp.asarray, (self.groups, self.keep))
        return sort_tokens(groups, keep, LENGTH, self.capacity)

    def heads(self):
        """For each head the group of each position, and the kept positions in order of (group, position)."""
        for head in range(2):
            ids = [tuple(int(group[0, head, p]) for group in self.groups) for p in range(LENGTH)]
            kept = [p for p in range(LENGTH) if self.keep is None or self.keep[0, 0, p]]
            yield ids, sorted(kept[: self.capacity], key=lambda p: (ids[p], p)), len(kept)


@st.composite
def tokens(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    groups = tuple(rng.choice(IDS, (1, 2, LENGTH)) for _ in range(draw(st.integers(0, 2))))
    keep = rng.random((1, 1, LENGTH)) < draw(st.sampled_from([0, 0.5, 1]))
    return Drawn(groups, draw(st.sampled_from([None, keep])), draw(st.sampled_from([None, 4])))


@given(tokens())
def test_sort_is_by_group_and_position(drawn):
    got = drawn.sort()
    shared = got.position.shape[1] == 1
    for head, (ids, order, wanted) in enumerate(drawn.heads()):
        row = (0, 0 if shared else head)
        np.testing.assert_array_equal(got.position[row][: len(order)], order)
        assert got.num_kept[row] == len(order)
        assert got.overflow[row] == wanted - len(order)
        np.testing.assert_array_equal(got.kept()[row], np.arange(got.position.shape[-1]) < len(order))
        for depth, group in enumerate(got.groups):
            np.testing.assert_array_equal(group[row][: len(order)], [ids[p][depth] for p in order])
        assert largest_group(got)[row] == max((sum(ids[p] == ids[q] for q in order) for p in order), default=0)
    if got.order is not None:
        np.testing.assert_array_equal(got.order, got.position)
        slots = got.order.shape[-1]
        for order, slot in zip(np.asarray(got.order)[0], np.asarray(got.slot)[0], strict=True):
            np.testing.assert_array_equal(slot[order], np.arange(slots))
            assert (np.delete(slot, order) == slots).all()


@given(tokens())
def test_count_below_is_a_count(drawn):
    got = drawn.sort()
    ends = [(group, at) for group in (-(2**31), 0, 1, 2**31 - 1) for at in (-5, 0, 4, LENGTH, LENGTH + 5)]
    probes = [((group, 0)[: len(drawn.groups)], at) for group, at in ends]
    groups = tuple(jnp.array([probe[0][d] for probe in probes], jnp.int32)[None, None] for d in range(len(got.groups)))
    counts = count_below(got, groups, jnp.array([at for _, at in probes], jnp.int32)[None, None])
    for head, (ids, order, _) in enumerate(drawn.heads()):
        expected = [sum((ids[p], p) < probe for p in order) for probe in probes]
        np.testing.assert_array_equal(counts[0, head if counts.shape[1] > 1 else 0], expected)


@pytest.mark.parametrize("length", [1, 33])
def test_invert(length):
    rng = np.random.default_rng(length)
    order = np.stack([[rng.permutation(length) for _ in range(3)] for _ in range(2)]).astype(np.int32)
    np.testing.assert_array_equal(invert(jnp.asarray(order)), np.argsort(order, axis=-1))


def test_one_group_with_nothing_dropped_is_not_sorted():
    got = sort_tokens((), None, LENGTH, None)
    assert got.order is got.slot is None
    assert got.groups == ()
    np.testing.assert_array_equal(got.position[0, 0], np.arange(LENGTH))
    np.testing.assert_array_equal(got.num_kept, [[LENGTH]])


def test_capacity_alone_drops_the_latest():
    got = sort_tokens((), None, LENGTH, 4)
    np.testing.assert_array_equal(got.position[0, 0], np.arange(4))
    np.testing.assert_array_equal(got.overflow, [[LENGTH - 4]])
