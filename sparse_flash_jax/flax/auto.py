"""Sparse where that is expected to be faster than dense attention, else dense: which pattern, and why.

The patterns themselves are left to pattern.py, and what time to expect of them to `time_share.py`.
"""

import dataclasses
import statistics
from typing import Any, NamedTuple

from jaxtyping import Array, Float, Int32, PRNGKeyArray

from sparse_flash_jax.flax.pattern import QK, Concrete, Dense, Hash, KeepScores
from sparse_flash_jax.kernels.implementations import cudnn_attends
from sparse_flash_jax.plan import AttentionPlan
from sparse_flash_jax.rounds import Rounds
from sparse_flash_jax.time_share import TimeShare, expected_time_share


class AutoChoice(NamedTuple):
    """What `Auto` chooses between for calls of one kind, and what it expects of them."""

    sparse: Hash | QK
    dense: Dense
    """With the backend that is fastest."""
    length: int
    """Tokens of a sequence."""
    density: float
    """Share of causal pairs that the sparse pattern is expected to show."""
    expected: TimeShare | None
    """Time of the sparse pattern; None where nothing like it was measured on a device like this."""

    @property
    def share(self) -> float | None:
        """Expected time of the sparse pattern over that of the dense one; None where that is not known."""
        if self.expected is None:
            return None
        return self.expected.share / (1.0 if self.dense.backend else self.expected.own_dense)

    @property
    def pattern(self) -> Dense | Hash | QK:
        """The one that runs: the sparse one, unless it is known to be no faster."""
        return self.sparse if self.share is None or self.share < 1 else self.dense

    def __str__(self) -> str:
        dense = f"{'cuDNN' if self.dense.backend else 'this package'}'s dense attention"
        chosen = "sparse" if self.pattern is self.sparse else "dense"
        where = f"{chosen}: at {self.length:,} tokens and density {self.density:.4g} {self.sparse}"
        if self.expected is None:
            return f"{where} was not measured: not with documents, or on no device like this"
        return f"{where} is expected to take {self.share:.2f} of the time of {dense} ({self.expected.source})"


@dataclasses.dataclass(frozen=True)
class Auto:
    """A sparse pattern where it is expected to be faster than dense attention, else dense attention.

    Chosen while tracing, from static shapes, the expected density and the device alone; `choose` tells. A layer that
    runs at several lengths may be dense at one and sparse at another; with `choose(...).pattern` it is one of them.
    What counts is forward + backward; forward alone pays later. Hashing and scoring are not in the measurements, so
    near break-even it errs to sparse. With a named implementation the expected time is still that of the default
    kernels. Nothing was measured of documents, with which it is sparse. Repeats of cuDNN's backward pass need not agree
    to the bit, as those of this package's kernels do.

    Args:
        sparse: `Hash` or `QK`, without a window, of one round.
        density: share of causal pairs that it is expected to show; None for evenly filled buckets, 1 / num_buckets, and
            for (1 - rate)**2, the mean over heads. Buckets of alike tokens show more, and so do heads of different
            rates that share keys: `plan.density()` tells.

    Raises:
        TypeError: if the pattern is neither.
        ValueError: if the sparse pattern has a window or several rounds, of which nothing was measured, or the density
            is not in (0, 1].
    """

    sparse: Hash | QK
    density: float | None = None

    def __post_init__(self):
        if not isinstance(self.sparse, Hash | QK):
            raise TypeError(f"Auto weighs a Hash or QK against dense attention, got {self.sparse!r}.")
        if self.sparse.window is not None:
            raise ValueError(f"Auto has no measurements of windows, leave out the window of {self.sparse}.")
        if isinstance(self.sparse, Hash) and (self.sparse.rounds > 1 or self.sparse.near is not None):
            raise ValueError(f"Auto has no measurements of several rounds, leave out rounds and near of {self.sparse}.")
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"density must be in (0, 1], the visible share of causal pairs, got {self.density}.")

    @property
    def expected_density(self) -> float:
        """Share of causal pairs that the sparse pattern is expected to show."""
        if self.density is not None:
            return self.density
        if isinstance(self.sparse, Hash):
            return 1 / self.sparse.num_buckets
        return statistics.fmean((1 - rate) ** 2 for rate in self.sparse.rates)

    def choose(
        self, length: int, *, dtype: Any, head_dim: int, documents: bool = False, implementation: str | None = None
    ) -> AutoChoice:
        """Returns what is expected of calls like this on the default device, and with it the pattern that runs.

        Dense attention is cuDNN's where it can do the call, else that of this package's kernels.

        Args:
            length: tokens of a sequence, T.
            dtype: of the heads.
            head_dim: H.
            documents: whether there are `segment_ids`.
            implementation: as of `sparse_attention`; a named one is for dense attention too.
        """
        method = "hash" if isinstance(self.sparse, Hash) else "qk"
        cudnn = implementation is None and not documents and cudnn_attends(dtype, head_dim)
        return AutoChoice(
            sparse=self.sparse,
            dense=Dense(backend="cudnn" if cudnn else None),
            length=length,
            density=self.expected_density,
            expected=None if documents else expected_time_share(length, self.expected_density, method=method),
        )

    def plan(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        *,
        key: PRNGKeyArray | None = None,
        segment_ids: Int32[Array, "B T"] | None = None,
        scores: KeepScores | None = None,
        implementation: str | None = None,
    ) -> AttentionPlan | Rounds:
        """Returns the plan of what is chosen for these queries."""
        options = {"key": key, "segment_ids": segment_ids, "scores": scores, "implementation": implementation}
        return resolve(self, q, segment_ids, implementation).plan(q, k, **options)


Pattern = Concrete | Auto


def resolve(
    pattern: Pattern,
    q: Float[Array, "B T N H"],
    segment_ids: Int32[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> Concrete:
    """Returns the pattern that runs for these queries: what `Auto` chooses, else the pattern itself."""
    if not isinstance(pattern, Auto):
        return pattern
    documents = segment_ids is not None
    return pattern.choose(
        q.shape[1], dtype=q.dtype, head_dim=q.shape[-1], documents=documents, implementation=implementation
    ).pattern


def is_scored(pattern: Pattern) -> bool:
    """Whether the layer learns scores by which tokens are kept."""
    sparse = pattern.sparse if isinstance(pattern, Auto) else pattern
    return isinstance(sparse, QK) and sparse.scored
