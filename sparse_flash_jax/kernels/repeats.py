"""Pairs that an earlier round of attention has shown, hidden within the runs of this one.

Rounds show overlapping pairs. So that each counts once, a round hides those whose ids were equal in an earlier one:
integers by slot, compared pair by pair in each tile that is visited, as a run cannot leave them out.
"""

from typing import Any, NamedTuple

from jax import lax
from jaxtyping import Array, Bool, Int32

from sparse_flash_jax.kernels.padding import pad_slots


class Repeats(NamedTuple):
    """Ids of both sides in each earlier round; of none, nothing is hidden.

    To the passes over queries these are the rows and keys the columns; in a kernel, refs of it. Batch and head axes may
    be 1, to stand for any size.
    """

    rows: tuple[Any, ...] = ()
    """int32 [B|1 N|1 T] of each round: id of the query in each slot."""
    columns: tuple[Any, ...] = ()
    """int32 [B|1 K|1 S] of each round: id of the key in each slot."""

    @property
    def transposed(self) -> "Repeats":
        """The same for a pass over rows of keys."""
        return Repeats(self.columns, self.rows)

    def padded(self, rows: int, columns: int) -> "Repeats":
        """Returns those of so many rows and columns."""
        return Repeats(tuple(pad_slots(x, rows) for x in self.rows), tuple(pad_slots(x, columns) for x in self.columns))


NO_REPEATS = Repeats()


def repeated(rows: Int32[Array, " rows"], columns: Int32[Array, " columns"]) -> Bool[Array, "rows columns"]:
    """Returns which pairs of a tile one earlier round has shown."""
    shape = rows.shape[0], columns.shape[0]
    return lax.broadcast_in_dim(rows, shape, [0]) == lax.broadcast_in_dim(columns, shape, [1])
