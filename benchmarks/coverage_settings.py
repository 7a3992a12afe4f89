"""The settings in which coverage is compared: how many buckets there are at a length, and how long chunks are."""

from collections.abc import Callable
from typing import NamedTuple

from reformer import chunk_size

BUCKETS = 16  # the paper's, arXiv 2306.01160
FIXED_CHUNK = 64  # of the code published with Reformer
TOKENS_OF_A_BUCKET = 512


class Setting(NamedTuple):
    """Functions of the length."""

    name: str
    buckets: Callable[[int], int]
    chunk: Callable[[int], int]


def _growing(length: int) -> int:
    return max(2, 2 * (length // (2 * TOKENS_OF_A_BUCKET)))


SETTINGS = (
    Setting("fixed", lambda length: BUCKETS, lambda length: min(FIXED_CHUNK, length)),
    Setting("rule", lambda length: BUCKETS, lambda length: chunk_size(length, BUCKETS)),
    Setting("growing", _growing, lambda length: chunk_size(length, _growing(length))),
)
