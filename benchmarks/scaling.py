"""How a training step grows with devices: weak scaling of the paper's model over the meshes that `train.py` has.

python benchmarks/scaling.py                                  16k tokens, every mesh of as many devices as there are
python benchmarks/scaling.py --meshes data=2 data=4 fsdp=4    these
python benchmarks/scaling.py --quick                          a tiny model, to see that it runs

The step is that of `train_step.py`, with `--tokens` tokens for each device of the mesh. Efficiency is tokens a second
over those of one device in the same run, times their number: 1 at best. Each mesh is compiled by a process of its own,
`--processes` side by side, and timed when all of those have compiled, one by one, over as many steps.
"""

import argparse
import dataclasses
import functools
import math
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, cast, get_args

import jax
import numpy as np
from environment import environment, written
from passes import memory_bytes
from selection import QUICK_LENGTH
from timing import alone, beside
from train_step import time_steps
from variants import HASHED, Variant, settings, vocabulary

from training.config import Exchange, TrainConfig
from training.errors import ConfigError
from training.mesh import AXES, make_layout
from training.model import transformer_config
from training.optimizer import make_optimizer
from training.step import TrainState, init_state, make_train_step, structure_of

RESULTS = Path(__file__).resolve().parent / "results"
LENGTH, TOKENS, BUCKETS = 16_384, 32_768, 16
STEPS = 5  # of a sample, of each mesh as many: buckets change as the model learns


def main() -> None:
    """Measures, prints a table, writes JSON."""
    args = _arguments()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # processes share the GPUs
    spawn = multiprocessing.get_context("spawn")  # a fork would share a parent's threads
    with ProcessPoolExecutor(args.processes, spawn, max_tasks_per_child=1) as pool:
        described, devices = pool.submit(environment).result(), pool.submit(jax.device_count).result()
        path = args.out or (None if args.quick else RESULTS / f"scaling-{described['platform']}.json")
        result: dict[str, Any] = {"environment": described, "steps": []}
        with written(result, path) as keep:
            print(f"{_variant(args)}, {args.length} tokens a sequence, {args.tokens} a device")
            print(f"{'mesh':<28}{'parallel':>9}{'ms':>9}{'tokens/s':>11}{'efficiency':>12}{'GiB':>7}")
            for record in pool.map(functools.partial(_record, args), [("data=1", "jit"), *_meshes(args, devices)]):
                result["steps"].append(record)
                if "failed" not in record:
                    one = result["steps"][0].get("tokens_per_second")
                    record["efficiency"] = one and record["tokens_per_second"] / one / record["devices"]
                print(_row(record), flush=True)
                keep()


def _arguments() -> argparse.Namespace:
    default = max(1, (os.cpu_count() or 1) // 4)
    parser = argparse.ArgumentParser(description="Times training steps over meshes of devices.")
    parser.add_argument("--meshes", nargs="+", help=f"meshes of {', '.join(AXES)}; default all of one or two axes")
    parser.add_argument("--attention", choices=("dense", "hash", "centred"), default="centred", help="kind")
    parser.add_argument("--exchange", choices=get_args(Exchange), default="gather", help="of keys, over context")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of a sequence")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens of a step for each device")
    parser.add_argument("--samples", type=int, default=5, help="samples of which the median is taken")
    parser.add_argument("--processes", type=int, default=default, help="that compile side by side; default %(default)s")
    parser.add_argument("--quick", action="store_true", help="a tiny model and length, one sample")
    parser.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/scaling-PLATFORM.json")
    args = parser.parse_args()
    if args.quick:
        args.length, args.tokens, args.samples = QUICK_LENGTH, 2 * QUICK_LENGTH, 1
    return args


def _variant(args: argparse.Namespace) -> Variant:
    return Variant(args.attention, BUCKETS if args.attention in HASHED else None)


def _meshes(args: argparse.Namespace, devices: int) -> list[tuple[str, str]]:
    if args.meshes:
        return [(mesh, "jit") for mesh in args.meshes]
    # Means of centred hashing go over whole sequences.
    axes = [axis for axis in AXES if axis != "context" or args.attention != "centred"]
    whole = [(f"{axis}={devices}", "jit") for axis in axes]
    halves = [(f"data={devices // 2},{axis}=2", "jit") for axis in ("fsdp", "tensor") if devices >= 4]
    return [*whole, *halves, (f"data={devices}", "pmap")] if devices > 1 else []


def _record(args: argparse.Namespace, divided: tuple[str, str]) -> dict[str, Any]:
    """Measures a mesh. One that cannot run says why, and the next has its turn."""
    mesh, parallel = divided
    record = {"mesh": mesh, "parallel": parallel, "length": args.length, "attention": str(_variant(args))}
    record |= {"exchange": args.exchange} if "context" in mesh else {}
    try:
        return record | _measured(args, mesh, parallel)
    except (jax.errors.JaxRuntimeError, ConfigError) as error:  # out of memory, or what cannot be divided
        if "SystemExit" in str(error):  # stopped while XLA, compiling, called Python
            raise
        return record | {"failed": str(error).splitlines()[0][:200]}


def _measured(args: argparse.Namespace, mesh: str, parallel: str) -> dict[str, Any]:
    devices = math.prod(int(part.split("=")[1]) for part in mesh.split(","))
    config = settings(_variant(args), args.length, args.tokens * devices, quick=args.quick)
    config = dataclasses.replace(config, mesh=mesh, exchange=args.exchange, parallel=parallel)
    with beside():
        step, state, batch, compile_seconds = _compiled(config, vocabulary(quick=args.quick))
    with alone():
        timing, last = time_steps(step, state, batch, args.samples, STEPS)
    return {
        "devices": devices,
        "batch": config.batch.size,
        "seconds": timing._asdict(),
        "tokens_per_second": config.batch.size * args.length / timing.median,
        "loss": float(last.loss),
        "visible": float(last.layers.visible.mean()),
        "memory_bytes": memory_bytes(step),
        "compile_seconds": compile_seconds,
    }


def _compiled(config: TrainConfig, vocabulary: int) -> tuple[jax.stages.Compiled, TrainState, Any, float]:
    """A training step, its state and a batch, and the seconds that it took to compile."""
    layout = make_layout(config)
    model = transformer_config(config, vocabulary)
    optimizer = make_optimizer(config.optimizer, config.steps)
    _, state = init_state(model, optimizer, config.seed, layout)
    structure = structure_of(layout.training_model(model))
    shape = (1, config.batch.size, config.batch.length + 1)
    batch = layout.place(np.random.default_rng(0).integers(0, model.vocab_size, shape, np.int32))
    train_step = cast(jax.stages.Wrapped, make_train_step(structure, optimizer, config.seed, None, layout))
    start = time.perf_counter()
    return train_step.lower(state, batch).compile(), state, batch, time.perf_counter() - start


def _row(record: dict[str, Any]) -> str:
    start = f"{record['mesh']:<28}{record['parallel']:>9}"
    if "failed" in record:
        return f"{start}  {record['failed']}"
    return (
        f"{start}{1e3 * record['seconds']['median']:>9.2f}{record['tokens_per_second']:>11.0f}"
        f"{record['efficiency'] or math.nan:>12.3f}{record['memory_bytes']['peak'] / 2**30:>7.2f}"
    )


if __name__ == "__main__":
    main()
