"""What `blocks.py` measures: masks of blocks by density, sinks beside a window, the blocks that suit best.

Numpy alone, so that a process of torch's draws the same masks.
"""

from typing import Literal, NamedTuple

import numpy as np


class BlockCase(NamedTuple):
    """A pattern and its tensors, B T N H; numbers that its kind does not have are 0."""

    kind: Literal["blocks", "sinks", "top_k"]
    batch: int
    length: int
    heads: int
    head_dim: int
    dtype: str
    block: int = 0
    """Tokens of a block."""
    percent: int = 0
    """Listed blocks of those of a causal mask."""
    chosen: int = 0
    """Blocks that each block of queries chooses, its own included."""
    sinks: int = 0
    window: int = 0

    @property
    def pattern(self) -> str:
        """Its name."""
        match self.kind:
            case "blocks":
                return f"blocks{self.block}-{self.percent}%"
            case "sinks":
                return f"sinks{self.sinks}-window{self.window}"
            case "top_k":
                return f"top{self.chosen}-of-blocks{self.block}"

    def __str__(self) -> str:
        return f"B{self.batch}-T{self.length}-N{self.heads}-H{self.head_dim}-{self.pattern}"

    def block_mask(self) -> np.ndarray:
        """Returns bool [1 N T/block T/block]: the diagonal and, equally many in each head, earlier blocks at random."""
        side = -(-self.length // self.block)
        rows, columns = np.tril_indices(side, -1)
        drawn = max(0, round(self.percent / 100 * (len(rows) + side)) - side)
        rng = np.random.default_rng([self.length, self.block, self.percent])
        mask = np.tile(np.eye(side, dtype=bool), (1, self.heads, 1, 1))
        for of_head in mask[0]:
            chosen = rng.choice(len(rows), drawn, replace=False, shuffle=False)
            of_head[rows[chosen], columns[chosen]] = True
        return mask
