"""FlexAttention under the masks of `blocks.py`, which starts this: a case a line on standard input, its seconds out.

Needs torch, which is no dependency of this project. `BlockMask.from_kv_blocks` gets the lists of a block mask, with
blocks below the diagonal as full ones; `create_block_mask` makes that of a rule.
"""

import functools
from collections.abc import Callable
from typing import Any

from block_cases import BlockCase
from flex_attention import device_seconds  # first, for what it sets before it imports torch
from flex_process import answer_all

# isort: split
import torch  # pyright: ignore[reportMissingImports]
from torch.nn.attention.flex_attention import (  # pyright: ignore[reportMissingImports]
    BlockMask,
    create_block_mask,
    flex_attention,
)

DEFAULT_BLOCK = 128  # of FlexAttention, whose default tiles have sides up to this


def main() -> None:
    """Answers each line with one, the versions first."""
    answer_all(_answer, {"torch": torch.__version__, "cuda": torch.version.cuda})


def _answer(case: dict[str, Any], samples: int) -> dict[str, Any]:
    try:
        return {"seconds": _measured(BlockCase(**case), samples)}
    finally:
        torch.cuda.empty_cache()


def _measured(case: BlockCase, samples: int) -> dict[str, float]:
    make_mask = _of_lists(case) if case.kind == "blocks" else _of_rule(case)
    mask, attend = make_mask(), _attention(case.length, case.block or DEFAULT_BLOCK)
    shape, dtype = (case.batch, case.heads, case.length, case.head_dim), getattr(torch, case.dtype)
    q, k, v = (torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3))
    do = torch.randn(shape, device="cuda", dtype=dtype)

    def forward_backward() -> Any:
        return torch.autograd.grad(attend(q, k, v, block_mask=mask), (q, k, v), do)

    return {"forward_backward": device_seconds(forward_backward, samples), "mask": device_seconds(make_mask, samples)}


@functools.lru_cache(maxsize=1)
def _attention(length: int, block: int) -> Callable[..., Any]:
    """Compiled for one length and block; its default tiles do not fit smaller blocks, of which tuning tries others."""
    torch.compiler.reset()  # or a compiled function stops specialising after a few shapes
    mode = "max-autotune-no-cudagraphs" if block < DEFAULT_BLOCK else None
    return torch.compile(flex_attention, dynamic=False, mode=mode)


def _causal(b, h, i, j):
    return i >= j


def _of_lists(case: BlockCase) -> Callable[[], BlockMask]:
    """Makes lists of the bool mask of blocks, as `create_block_mask` does once it has one."""
    blocks = torch.as_tensor(case.block_mask(), device="cuda")
    diagonal = torch.eye(blocks.shape[-1], dtype=torch.bool, device="cuda")

    def lists(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        order = torch.argsort(mask.to(torch.int32), dim=-1, descending=True, stable=True)
        return mask.sum(dim=-1, dtype=torch.int32), order.to(torch.int32)

    def make_mask() -> BlockMask:
        partial, full = lists(blocks & diagonal), lists(blocks & ~diagonal)
        return BlockMask.from_kv_blocks(*partial, *full, BLOCK_SIZE=case.block, mask_mod=_causal)

    return make_mask


def _of_rule(case: BlockCase) -> Callable[[], BlockMask]:
    sinks, window = case.sinks, case.window

    def visible(b, h, i, j):
        return (i >= j) & ((j < sinks) | (i - j < window))

    build = torch.compile(create_block_mask)
    return lambda: build(visible, None, None, case.length, case.length, device="cuda")


if __name__ == "__main__":
    main()
