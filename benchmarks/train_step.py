"""How fast a whole training step of the paper's language model is: dense, hash-sparse, and without any attention.

python benchmarks/train_step.py                    8k to 64k tokens on one GPU; JSON to benchmarks/results/
python benchmarks/train_step.py --lengths 16384    one length
python benchmarks/train_step.py --quick            a tiny model, to see that it runs

The step is that of `training/step.py`, forward, backward and optimizer in one program, on the model of the preset
`paper-8k`: bfloat16, a vocabulary of 50304, one micro-batch, as many tokens at each length, drawn at random. What
differs is attention (`variants.py`):

    none     q, k and v are added instead; all else stays, so no attention can make a step faster than this floor
    dense    jax.nn.dot_product_attention(is_causal=True), cuDNN's on a GPU
    causal   this package's own kernels with the causal plan (by request)
    mha      JAX's Pallas-Triton kernels, backward with the tiles that are fastest (GPU)
    hash     this package's hash-sparse attention
    centred  the same, hashing vectors minus their running mean

MFU is FLOPs / seconds / 989.4e12, the dense bfloat16 peak of an H100 or H200 SXM, where

    FLOPs = 6 * parameters of matrix products * tokens + 12 * H * visible pairs * query heads * layers

A dense sequence has T (T + 1) / 2 visible pairs; hash-sparse attention counts 1 / num_buckets of them, and what a step
computes again counts nothing. `mfu_model` leaves attention's FLOPs out, though not its time.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from environment import environment, written
from passes import memory_bytes
from selection import QUICK_LENGTH
from timing import Timing, measure
from variants import KINDS, Variant, flops, settings, variants, vocabulary, with_attention

from training.model import transformer_config
from training.optimizer import make_optimizer
from training.step import StepMetrics, TrainState, init_state, make_train_step

RESULTS = Path(__file__).resolve().parent / "results"
LENGTHS = (8192, 16_384, 32_768, 65_536)
TOKENS = 32_768  # of a step; a longer sequence comes alone
SAMPLE_SECONDS = 0.5  # of steps in flight together, as in training: the device never waits for the host
MOST_STEPS = 20  # of a sample
PEAK_FLOPS = {"NVIDIA H100 80GB HBM3": 989.4e12, "NVIDIA H200": 989.4e12}


def main() -> None:
    """Measures, prints a table, writes JSON."""
    args = _arguments()
    platform = jax.default_backend()
    kinds = args.attention or [kind for kind in KINDS if kind != "causal" and (kind != "mha" or platform == "gpu")]
    samples = 1 if args.quick else args.samples
    lengths, tokens = ((QUICK_LENGTH,), QUICK_LENGTH) if args.quick else (args.lengths, args.tokens)
    result: dict[str, Any] = {"environment": environment(), "steps": []}
    with written(result, args.out or (None if args.quick else RESULTS / f"train-step-{platform}.json")):
        print(_HEADER)
        for length in lengths:
            medians: dict[str, float] = {}
            for variant in variants(kinds, length, args.buckets):
                record = _record(variant, length, tokens, samples, quick=args.quick)
                if "seconds" in record:
                    median = record["seconds"]["median"]
                    record["speedup"] = {f"over_{name}": seconds / median for name, seconds in medians.items()}
                    medians[str(variant)] = median
                result["steps"].append(record)
                print(_row(record), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Times whole training steps, dense and sparse.")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of a sequence")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens of a step; a longer sequence comes alone")
    parser.add_argument("--attention", nargs="+", choices=KINDS, help="kinds; default all of the device but causal")
    parser.add_argument("--buckets", type=int, nargs="+", help="of what hashes; default 16, from 65536 tokens on 64")
    parser.add_argument("--samples", type=int, default=5, help="samples of which the median is taken")
    parser.add_argument("--quick", action="store_true", help="a tiny model and length, one sample")
    parser.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/train-step-PLATFORM.json")
    return parser.parse_args()


def _record(variant: Variant, length: int, tokens: int, samples: int, *, quick: bool) -> dict[str, Any]:
    """Measures a step. One that cannot run says why, and the next has its turn."""
    record: dict[str, Any] = {"attention": str(variant), "length": length}
    try:
        return record | _measured(variant, length, tokens, samples, quick=quick)
    except (jax.errors.JaxRuntimeError, ImportError, NotImplementedError) as error:
        return record | {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


def _measured(variant: Variant, length: int, tokens: int, samples: int, *, quick: bool) -> dict[str, Any]:
    """Compiles a step, takes it once, times it, and relates the time to the work."""
    config = settings(variant, length, tokens, quick=quick)
    model = transformer_config(config, vocabulary(quick=quick))
    optimizer = make_optimizer(config.optimizer, config.steps)
    structure, state = init_state(model, optimizer, config.seed)
    structure = with_attention(variant, structure, state.params)
    work = flops(variant, model, config.batch, state.params)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    shape = (1, config.batch.size, length + 1)
    batch = jax.device_put(np.random.default_rng(0).integers(0, model.vocab_size, shape, np.int32))

    # Typed as any function; a jitted one can be asked for its memory.
    train_step = cast(jax.stages.Wrapped, make_train_step(structure, optimizer, config.seed, None))
    start = time.perf_counter()
    step = train_step.lower(state, batch).compile()
    compile_seconds = time.perf_counter() - start
    state, first = step(state, batch)
    timing, last = time_steps(step, state, batch, samples)

    def both(value: Callable[[StepMetrics], jax.Array]) -> dict[str, float]:
        return {"first": float(value(first)), "last": float(value(last))}

    return {
        "batch": config.batch.size,
        "seconds": timing._asdict(),
        "tokens_per_second": config.batch.size * length / timing.median,
        "parameters": parameters,
        "flops": work,
        **_mfu(work, timing.median),
        "visible": None if variant.kind == "none" else both(lambda metrics: metrics.layers.visible.mean()),
        "loss": both(lambda metrics: metrics.loss),
        "memory_bytes": memory_bytes(step),
        "compile_seconds": compile_seconds,
    }


def time_steps(
    step: jax.stages.Compiled, state: TrainState, batch: jax.Array, samples: int, steps: int | None = None
) -> tuple[Timing, StepMetrics]:
    """Times a step, which consumes its state; returns seconds a step, and what the last one measured.

    Args:
        step: compiled.
        state: from which it begins; the model learns on.
        batch: of each step.
        samples: of which the median is taken.
        steps: of a sample; None for as many as take `SAMPLE_SECONDS`.
    """
    state, metrics = jax.block_until_ready(step(state, batch))
    start = time.perf_counter()
    state, metrics = jax.block_until_ready(step(state, batch))
    steps = steps or min(MOST_STEPS, math.ceil(SAMPLE_SECONDS / (time.perf_counter() - start)))

    def several() -> TrainState:
        nonlocal state, metrics
        for _ in range(steps):
            state, metrics = step(state, batch)
        return state

    timing = measure(several, samples=samples)
    each = {name: getattr(timing, name) / steps for name in ("median", "best", "worst")}
    return timing._replace(**each, calls=timing.calls * steps), metrics


def _mfu(work: dict[str, float], seconds: float) -> dict[str, float | None]:
    """The shares of the device's peak; None where that is not known."""
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    if peak is None:
        return {"mfu": None, "mfu_model": None}
    return {"mfu": sum(work.values()) / seconds / peak, "mfu_model": work["model"] / seconds / peak}


_HEADER = (
    "ms a step, medians; MFU with attention, and of the model alone; GiB: peak; visible: share of dense's pairs;\n"
    "x dense: over the dense step; x none: over the step without attention, 1 at best\n"
    f"{'length':>7} {'attention':<10}{'batch':>6}{'ms':>9}{'tokens/s':>10}{'MFU':>7}{'model':>7}{'GiB':>7}"
    f"{'visible':>9}{'x dense':>9}{'x mha':>7}{'x none':>8}{'compile s':>11}"
)


def _row(record: dict[str, Any]) -> str:
    start = f"{record['length']:>7} {record['attention']:<10}"
    if "failed" in record:
        return f"{start}  {record['failed']}"
    cells = [f"{record['batch']:>6}{1e3 * record['seconds']['median']:>9.2f}{record['tokens_per_second']:>10.0f}"]
    cells += [_cell(record[name], 7, 3) for name in ("mfu", "mfu_model")]
    cells.append(f"{record['memory_bytes']['peak'] / 2**30:>7.2f}")
    cells.append(_cell(record["visible"] and record["visible"]["last"], 9, 4))
    cells += [_cell(record["speedup"].get(f"over_{n}"), w, 2) for n, w in (("dense", 9), ("mha", 7), ("none", 8))]
    return f"{start}{''.join(cells)}{record['compile_seconds']:>11.1f}"


def _cell(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.{digits}f}"


if __name__ == "__main__":
    main()
