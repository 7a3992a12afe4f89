"""PyTorch's FlexAttention on the benchmarks' own tokens, on a CUDA GPU: the block mask by itself, then attention.

FlexAttention skips blocks that its mask hides, so tokens come already sorted by (group, position), dropped ones cut
off; that sort is not timed. Needs torch, which is no dependency of this project.

JAX_PLATFORMS=cpu python benchmarks/flex_attention.py --cases '*hash16*'    JSON to benchmarks/results/
"""

import argparse
import functools
import math
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("TORCHINDUCTOR_PERSISTENT_REDUCTIONS", "0")  # else the block mask's kernel compiles for minutes

import torch  # pyright: ignore[reportMissingImports]
from environment import environment, written
from selection import Case, select
from torch.nn.attention.flex_attention import (  # pyright: ignore[reportMissingImports]
    create_block_mask,
    flex_attention,
)

RESULTS = Path(__file__).resolve().parent / "results"
CALLS = 10  # timed together
SAMPLE_SECONDS = 0.1  # long against the clock: of long calls there are fewer in a sample


def main() -> None:
    """Measures, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(description="Times torch FlexAttention.")
    parser.add_argument("--cases", nargs="+", default=["*N12-H64*bf16", "*N16-H128*bf16"], help="as of attention.py")
    parser.add_argument("--samples", type=int, default=5, help="samples of which the median is taken")
    parser.add_argument("--out", type=Path, default=RESULTS / "flex-attention-gpu.json")
    args = parser.parse_args()
    named = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
    result: dict[str, Any] = {"environment": environment() | named, "cases": []}
    with written(result, args.out):
        print(f"ms, medians\n{'case':<36}{'mask':>9}{'fwd':>9}{'f+b':>9}")
        for case in select(args.cases, "gpu"):
            record = _record(case, args.samples)
            result["cases"].append(record)
            ms = [1e3 * record["seconds"][name] for name in ("mask", "forward", "forward_backward")]
            print(f"{record['case']:<36}" + "".join(f"{x:>9.3f}" for x in ms), flush=True)
            torch.compiler.reset()  # or a compiled function stops specialising after a few shapes


def _record(case: Case, samples: int) -> dict[str, Any]:
    calls = calls_of(case)
    del calls["backward"]
    return {"case": str(case), "seconds": {name: device_seconds(call, samples) for name, call in calls.items()}}


def calls_of(case: Case) -> dict[str, Callable[[], Any]]:
    """Returns what builds the block mask, and attention: forward, backward alone after a forward, and both."""
    s, arrays = case.shape, case.arrays()
    last, rank = (_ranks(case, arrays, side, heads) for side, heads in (("query", s.N), ("key", s.key_heads)))
    position = last % s.T
    first = last - torch.clamp(position, max=(case.pattern.window or s.T) - 1)
    group = s.N // s.key_heads

    # Ranks order tokens by group, then position: what a query sees lies between its window's first rank and its own.
    def visible(b, h, i, j):
        k = rank[b, h // group, j]
        return (first[b, h, i] <= k) & (k <= last[b, h, i])

    lengths = last.shape[-1], rank.shape[-1]
    build = torch.compile(create_block_mask)
    make_mask = lambda: build(visible, s.B, s.N, *lengths, device="cuda")
    mask = make_mask()
    shapes = [(s.B, heads, length, s.H) for heads, length in ((s.N, lengths[0]), *[(s.key_heads, lengths[1])] * 2)]
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes)
    do = torch.randn(shapes[0], device="cuda", dtype=torch.bfloat16)
    attend = torch.compile(flex_attention)

    def forward() -> Any:
        return attend(q, k, v, block_mask=mask, enable_gqa=group > 1)

    def gradients(o: torch.Tensor, **options: bool) -> Any:
        return torch.autograd.grad(o, (q, k, v), do, **options)

    kept = functools.cache(forward)  # with what its backward pass needs

    def forward_alone() -> Any:
        with torch.no_grad():
            return forward()

    return {
        "mask": make_mask,
        "forward": forward_alone,
        "forward_backward": lambda: gradients(forward()),
        "backward": lambda: gradients(kept(), retain_graph=True),
    }


def _ranks(case: Case, arrays: dict[str, Any], side: str, heads: int) -> torch.Tensor:
    """group * T + position of a side's kept tokens in sorted order, int32 [B heads L]."""
    length = case.shape.T if side == "query" else case.shape.keys
    axes = (case.shape.B, length, heads)
    group = np.broadcast_to(arrays.get(f"{side}_group", np.int32(0)), axes).swapaxes(1, 2)
    keep = np.broadcast_to(arrays.get(f"{side}_keep", np.True_), axes).swapaxes(1, 2)
    order = np.lexsort((group, ~keep), axis=-1)[..., : keep.sum(axis=-1).max()]  # stable: positions stay in order
    rank = np.take_along_axis(group * case.shape.T + np.arange(length), order, axis=-1)
    return torch.as_tensor(rank.astype(np.int32), device="cuda")


def device_seconds(call: Callable[[], Any], samples: int) -> float:
    """Returns seconds a call on the GPU, the median over samples, after a warm-up."""
    for _ in range(2):
        call()
    calls = min(CALLS, math.ceil(SAMPLE_SECONDS / _seconds(call, 1)))
    return statistics.median(_seconds(call, calls) for _ in range(samples))


def _seconds(call: Callable[[], Any], calls: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / calls / 1e3


if __name__ == "__main__":
    main()
