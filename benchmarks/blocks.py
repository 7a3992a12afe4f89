"""How fast attention is under block masks, and to sinks beside a window: against dense attention, and FlexAttention.

python benchmarks/blocks.py                          every case; JSON to benchmarks/results/, row by row
python benchmarks/blocks.py --lengths 8192 16384     sinks and chosen blocks are of the longest
python benchmarks/blocks.py --blocks --no-flex       no masks of blocks; nothing of torch's
python benchmarks/blocks.py --quick                  one tiny length, to see that it runs

All times are of forward + backward, from q, k and v by position.
"""

import argparse
import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from block_cases import BlockCase
from environment import environment, written
from flex_process import FlexProcess, has_torch
from passes import Call, dense_calls, forward_tiles, planned_step, tensors
from selection import QUICK_LENGTH, Case, Shape, causal
from timing import measure

import sparse_flash_jax as sfj

RESULTS = Path(__file__).resolve().parent / "results"
LENGTHS = {"cpu": (1024, 4096), "gpu": (8192, 16_384, 32_768, 65_536)}
SHAPES = {
    "cpu": (1, 4, 64, "float32"),
    "gpu": (32_768, 12, 64, "bfloat16"),
}  # tokens of a batch, heads, head dim, dtype
BLOCKS, QUICK_BLOCKS = (64, 128), (64,)
DENSITIES, QUICK_DENSITIES = (10, 25, 50, 75, 100), (50, 100)  # percent of causal blocks
SINKS, WINDOW, QUICK_WINDOW = 4, 1024, 64
CHOSEN, QUICK_CHOSEN = (512, 8), (64, 2)  # tokens of a block, and blocks that each chooses
OURS = ("given", "made")
TIMED = {"blocks": OURS, "sinks": ("given",), "top_k": ("made",)}  # no data decides the one, q and k the other
HEADER = (
    "ms, forward + backward: over a given plan, and with the plan made in the same jit; share: tiles that the forward\n"
    "pass visits over dense causal's; / share: time over dense time x share, of both; flex: FlexAttention, its mask\n"
    f"{'case':<42}{'share':>8}{'dense':>9}{'given':>9}{'made':>9}{'x':>7}{'x made':>8}{'/ share':>9}{'made':>7}"
    f"{'flex':>9}{'mask':>9}"
)

Planner = Callable[..., sfj.AttentionPlan]
"""A plan of what decides it, q and k."""


def main() -> None:
    """Measures, prints a table, writes JSON."""
    args = _arguments()
    platform = jax.default_backend()
    samples = 1 if args.quick else args.samples
    path = args.out or (None if args.quick else RESULTS / f"blocks-{platform}.json")
    result: dict[str, Any] = {"environment": environment(), "flex_attention": _why_no_flex(args, platform), "cases": []}
    with written(result, path) as keep, contextlib.closing(FlexProcess("flex_blocks.py")) as flex:
        print(HEADER)
        for case, dense in _with_dense(_cases(args, platform), "xla" if platform == "cpu" else "cudnn", samples):
            record = _record(case, dense, args.implementation, samples)
            if result["flex_attention"] is None and case.kind != "top_k":
                _add_flex(record, flex.ask(case._asdict(), samples))
                result["environment"] |= flex.versions
            result["cases"].append(record)
            print(_row(record), flush=True)
            keep()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Times attention under block masks, and to sinks and a window.")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of a sequence; default those of the platform")
    parser.add_argument("--blocks", type=int, nargs="*", help=f"tokens of a block; default {BLOCKS}")
    parser.add_argument("--densities", type=int, nargs="*", help=f"percent of causal blocks; default {DENSITIES}")
    parser.add_argument("--no-flex", action="store_true", help="leave out FlexAttention, which needs torch and a GPU")
    parser.add_argument("--quick", action="store_true", help="one tiny length and block, one sample")
    parser.add_argument("--samples", type=int, default=5, help="samples of which the median is taken")
    parser.add_argument("--implementation", help='"mosaic", "triton" or "xla"; default picks for the device')
    parser.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/blocks-PLATFORM.json")
    return parser.parse_args()


def _why_no_flex(args: argparse.Namespace, platform: str) -> str | None:
    if args.no_flex:
        return "left out"
    if platform != "gpu":
        return "not run: no GPU"
    return None if has_torch() else "not run: no torch"


def _cases(args: argparse.Namespace, platform: str) -> Iterator[BlockCase]:
    quick = args.quick
    lengths = args.lengths or ((QUICK_LENGTH,) if quick else LENGTHS[platform])
    blocks = (QUICK_BLOCKS if quick else BLOCKS) if args.blocks is None else args.blocks
    densities = (QUICK_DENSITIES if quick else DENSITIES) if args.densities is None else args.densities
    for length in sorted(lengths):
        plain = functools.partial(_case, platform, length)
        for block in blocks:
            yield from (plain("blocks", block=block, percent=percent) for percent in densities)
        if length == max(lengths):
            block, chosen = QUICK_CHOSEN if quick else CHOSEN
            yield plain("sinks", sinks=SINKS, window=QUICK_WINDOW if quick else WINDOW)
            yield plain("top_k", block=block, chosen=chosen)


def _case(platform: str, length: int, kind: Literal["blocks", "sinks", "top_k"], **numbers: int) -> BlockCase:
    tokens, heads, head_dim, dtype = SHAPES[platform]
    return BlockCase(kind, max(1, tokens // length), length, heads, head_dim, dtype, **numbers)


def _with_dense(
    cases: Iterator[BlockCase], implementation: Literal["xla", "cudnn"], samples: int
) -> Iterator[tuple[BlockCase, dict[str, Any] | str]]:
    """Times dense attention once for each shape, and gives it, or why there is none, with each case."""
    timed: dict[Case, dict[str, Any] | str] = {}
    for case in cases:
        plain = _plain(case)
        if plain not in timed:
            try:
                timed[plain] = _seconds(dense_calls(plain, implementation)["dense_forward_backward"], samples)
            except Exception as error:  # whatever it is, the cases to come are to be measured
                timed[plain] = _why(error)
        yield case, timed[plain]


def _plain(case: BlockCase) -> Case:
    """The dense causal case on the same tensors."""
    return Case(Shape(case.batch, case.length, case.heads, case.head_dim), causal, case.dtype)


def _record(case: BlockCase, dense: dict[str, Any] | str, implementation: str | None, samples: int) -> dict[str, Any]:
    """Times a case and relates it to dense attention; what fails is said in `failed`, part by part."""
    seconds, failed, tiles = {}, {}, {}
    (failed if isinstance(dense, str) else seconds)["dense"] = dense

    def attempt(into: dict[str, Any], part: str, measured: Callable[[], Any]) -> None:
        try:
            into[part] = measured()
        except Exception as error:  # out of memory, or a kernel that does not compile: the other parts are to go on
            failed[part] = _why(error)

    attempt(tiles, "tiles", lambda: _tiles(case, implementation))
    for name in TIMED[case.kind]:
        attempt(seconds, name, lambda call=CALLS[name]: _seconds(call(case, implementation), samples))
    record = {"case": str(case), **case._asdict(), **tiles, "seconds": seconds, "failed": failed}
    if "dense" in seconds:
        ratio = {name: seconds[name]["median"] / seconds["dense"]["median"] for name in OURS if name in seconds}
        record["speedup"] = {name: 1 / x for name, x in ratio.items()}
        if tiles:
            record["over_share"] = {name: x / tiles["tiles"]["share"] for name, x in ratio.items()}
    return record


def _seconds(call: Call, samples: int) -> dict[str, Any]:
    return measure(call.function, *call.args, samples=samples)._asdict()


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"


def _given_call(case: BlockCase, implementation: str | None) -> Call:
    q, k, v, do = tensors(_plain(case).shape, case.dtype)
    plan = jax.jit(_planner(case))(_deciding(case), q, k)
    return Call(planned_step(_given, implementation), (plan, q, k, v, do))


def _made_call(case: BlockCase, implementation: str | None) -> Call:
    operands = tensors(_plain(case).shape, case.dtype)
    return Call(planned_step(_planner(case), implementation), (_deciding(case), *operands))


CALLS = {"given": _given_call, "made": _made_call}


def _deciding(case: BlockCase) -> jax.Array | None:
    """The mask, of what is drawn."""
    return jnp.asarray(case.block_mask()) if case.kind == "blocks" else None


def _given(plan: sfj.AttentionPlan, q: jax.Array, k: jax.Array) -> sfj.AttentionPlan:
    return plan


def _planner(case: BlockCase) -> Planner:
    """One function for all densities of a block size, which then compile together."""
    match case.kind:
        case "blocks":
            return _of_blocks(case.block)
        case "sinks":
            return _of_sinks(case.sinks, case.window)
        case "top_k":
            return _of_top_k(case.block, case.chosen)


@functools.cache
def _of_blocks(block: int) -> Planner:
    return lambda mask, q, k: sfj.block_sparse(mask, block, query_length=q.shape[1], key_length=k.shape[1])


@functools.cache
def _of_sinks(sinks: int, window: int) -> Planner:
    return lambda _, q, k: sfj.sinks_and_window(q.shape[1], sinks, window)


@functools.cache
def _of_top_k(block: int, count: int) -> Planner:
    return lambda _, q, k: sfj.block_top_k(q, k, block, count)


def _tiles(case: BlockCase, implementation: str | None) -> dict[str, Any]:
    """Tiles of a head that the forward pass visits, and those of dense causal attention at the same size."""
    q, k, *_ = tensors(_plain(case).shape, case.dtype)
    deciding = _deciding(case)
    if deciding is not None:
        deciding = deciding[:, :1]  # a head is like any other: as many blocks, and the diagonal
    plan = jax.jit(_planner(case))(deciding, q, k)
    stats = forward_tiles(plan, case.dtype, case.head_dim, implementation)
    dense = sfj.causal(case.length).stats(stats.block_q, stats.block_k)
    executed = stats.executed_tiles / stats.heads
    return {
        "block_q": stats.block_q,
        "block_k": stats.block_k,
        "executed": executed,
        "causal": dense.executed_tiles,
        "share": executed / dense.executed_tiles,
        "density": stats.density,
    }


def _add_flex(record: dict[str, Any], answer: dict[str, Any]) -> None:
    if "failed" in answer:
        record["failed"]["flex"] = answer["failed"][:400]
    else:
        record["flex_seconds"] = answer["seconds"]


def _row(record: dict[str, Any]) -> str:
    seconds, flex = record["seconds"], record.get("flex_seconds", {})
    speedup, over_share = record.get("speedup", {}), record.get("over_share", {})
    ms = [1e3 * seconds[name]["median"] if name in seconds else None for name in ("dense", *OURS)]
    of_flex = [1e3 * flex[name] if name in flex else None for name in ("forward_backward", "mask")]
    values = [record.get("tiles", {}).get("share"), *ms, *map(speedup.get, OURS), *map(over_share.get, OURS), *of_flex]
    formats = ("8.4f", "9.3f", "9.3f", "9.3f", "7.2f", "8.2f", "9.2f", "7.2f", "9.3f", "9.3f")
    cells = [
        f"{'-':>{form.split('.')[0]}}" if value is None else f"{value:>{form}}"
        for value, form in zip(values, formats, strict=True)
    ]
    failed = [f"\n  {part}: {why.splitlines()[0][:110]}" for part, why in record["failed"].items()]
    return "".join([f"{record['case']:<42}", *cells, *failed])


if __name__ == "__main__":
    main()
