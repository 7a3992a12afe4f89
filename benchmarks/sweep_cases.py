"""What `sweeps.py` measures: lengths, heads and patterns of the paper's run-time figures, and ways to compute each.

It also decides what is left out for want of memory, and which cases are compiled in one process.
"""

import heapq
import operator
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pattern_names import parted
from selection import Case, Shape, buckets_pattern, causal, dropping

BUCKETS = (2, 4, 8, 16, 32, 64)
DROPPED = (20, 30, 40, 50, 60, 70, 80)  # percent of queries, and of keys
LENGTHS = (1024, 2048, 4096, 8192, 16_384, 32_768, 65_536)
HEADS = (12, 48)
BATCH, HEAD_DIM = 4, 64
HASHED = tuple(f"hash{count}" for count in BUCKETS)
QK = tuple(f"qk{percent}" for percent in DROPPED)
# Of a mask that is given all pairs are computed, whatever it shows; one of each method is to show that.
MASKED = ("hash16", "qk50")
FLEX, FLEX_HEADS, FLEX_LENGTHS = ("hash16", "hash64", "qk50"), (12,), (1024, 4096, 16_384, 32_768)
PARTS = ("forward", "backward", "forward_backward")
METHODS = ("dense", "sparse", "naive", "naive_cudnn", "flex")
# Bytes for a pair of a query and a key at the peak of forward + backward: the mask; then float32 scores, their softmax
# and its gradient, or the mask as a bfloat16 bias and, of JAX versions that make one, the bias's gradient.
NAIVE_BYTES = {"naive": 1 + 3 * 4, "naive_cudnn": 1 + 2 * 2}
NAIVE_ROOM = 60e9  # of the 80 GB of a card, where other processes hold some


class SweepCase(NamedTuple):
    """A pattern on tensors B T N H, and what computes it."""

    method: str
    """One of `METHODS`: JAX's own dense attention, ours, JAX's given a T x T mask, FlexAttention."""
    pattern: str
    """"causal" of dense attention, else "hash16", "qk50" and so on."""
    batch: int
    length: int
    heads: int
    head_dim: int
    dtype: str

    @property
    def case(self) -> Case:
        """The same as a case of the tests' list, which draws its ids and masks."""
        return Case(Shape(self.batch, self.length, self.heads, self.head_dim), self._pattern(), self.dtype)

    def _pattern(self):
        method, number = parted(self.pattern)
        if method == "causal":
            return causal
        return buckets_pattern(int(number)) if method == "hash" else dropping(int(number), self.length)

    def __str__(self) -> str:
        return f"{self.case}, {self.method}"

    @property
    def left_out(self) -> str | None:
        """Why it is not to be run, or None."""
        if self.method not in NAIVE_BYTES:
            return None
        needed = NAIVE_BYTES[self.method] * self.batch * self.heads * self.length**2
        if needed <= NAIVE_ROOM:
            return None
        return f"its T x T arrays take about {needed / 1e9:.0f} GB"

    @property
    def peak_bytes(self) -> int:
        """What it holds at most, roughly: inputs, outputs, rows by slot and sums of dq; or its T x T arrays."""
        rows = self.batch * self.heads * self.length * self.head_dim * 2
        return 14 * rows + NAIVE_BYTES.get(self.method, 0) * self.batch * self.heads * self.length**2


def sweep_cases(
    lengths: Sequence[int],
    heads: Sequence[int],
    methods: Iterable[str],
    patterns: Sequence[str] | None,
    flex_lengths: Sequence[int],
    *,
    batch: int,
    head_dim: int,
    dtype: str,
) -> list[SweepCase]:
    """Returns all cases, left-out ones among them.

    Args:
        lengths: T.
        heads: N.
        methods: some of `METHODS`.
        patterns: those to be had besides dense attention; None for all.
        flex_lengths: T at which FlexAttention is measured, too, at `FLEX_HEADS` alone.
        batch: B.
        head_dim: H.
        dtype: of q, k and v.
    """
    of_method = {"dense": ("causal",), "sparse": HASHED + QK, "flex": FLEX} | dict.fromkeys(NAIVE_BYTES, MASKED)
    return [
        SweepCase(method, pattern, batch, length, n, head_dim, dtype)
        for length in lengths
        for n in heads
        for method in methods
        for pattern in of_method[method]
        if method == "dense" or patterns is None or pattern in patterns
        if method != "flex" or (n in FLEX_HEADS and length in flex_lengths)
    ]


def shares(cases: Iterable[SweepCase], processes: int) -> list[list[SweepCase]]:
    """Returns the cases of each process, about equally many, the processes that need most memory last.

    Cases stay together that have kernels in common, which a process compiles once: the buckets of a shape, and its
    dropped shares, whose kernels differ. Of each process the largest cases come first: what they have held then serves
    the others.
    """
    units: dict[tuple, list[SweepCase]] = {}
    for case in cases:
        family = parted(case.pattern)[0] if case.method == "sparse" else case.method
        units.setdefault((case.length, case.heads, family), []).append(case)
    heap: list[tuple[int, int, list[SweepCase]]] = [(0, i, []) for i in range(processes)]
    for unit in sorted(units.values(), key=len, reverse=True):
        count, i, share = heapq.heappop(heap)
        heapq.heappush(heap, (count + len(unit), i, share + unit))
    size = operator.attrgetter("peak_bytes")
    filled = [sorted(share, key=size, reverse=True) for _, _, share in heap if share]
    return sorted(filled, key=lambda share: size(share[0]))
