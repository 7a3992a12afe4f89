"""Block sizes: which tiles a kernel works in. Plans know nothing of them, so passes may tile differently."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tile of one pass: `rows` of the output's operand (queries; keys for dK/dV) by `columns` streamed past it."""

    rows: int
    columns: int


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiles of the three passes."""

    forward: Blocks
    dq: Blocks
    dkv: Blocks


def xla_config(query_slots: int, key_slots: int) -> Config:
    """Returns tiles for the XLA implementation.

    256 x 128 was the fastest or nearly so on two CPU cores, for dense and for 16-bucket runs at 8k. A larger tile
    computes more in vain where runs are short, a smaller one pays more loop overhead.
    """
    q, k = (min(256, _multiple_of_8(query_slots)), min(256, _multiple_of_8(key_slots)))
    by_queries = Blocks(rows=q, columns=min(128, k))
    return Config(forward=by_queries, dq=by_queries, dkv=Blocks(rows=k, columns=min(128, q)))


def _multiple_of_8(slots: int) -> int:
    return -(-slots // 8) * 8
