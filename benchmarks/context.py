"""How fast attention is over a sequence that is divided over devices: both exchanges, in order and in a zigzag.

python benchmarks/context.py                       the platform's lengths over all devices; JSON to benchmarks/results/
python benchmarks/context.py --check               each result beside that of one device, which is timed, too
python benchmarks/context.py --count               times nothing: pairs and tiles of each device, by its plans
python benchmarks/context.py --devices 8 --quick   one tiny length, to see that it runs (8 virtual devices on a CPU)

Several of these at once, each with some of the lengths or --buckets, compile side by side and time by turns.
"""

import argparse
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from context_work import work
from environment import environment, written
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from passes import memory_bytes
from selection import QUICK_LENGTH
from timing import alone, beside, measure

import sparse_flash_jax as sfj

RESULTS = Path(__file__).resolve().parent / "results"
BUCKETS = (0, 16, 64)  # 0: causal
LENGTHS = {"cpu": (4096, 16_384), "gpu": (65_536, 131_072, 262_144)}
SHAPES = {"cpu": (4, 64, "float32"), "gpu": (12, 64, "bfloat16")}  # heads, head dim, dtype
COUNTED_LENGTH = 8192
COUNTED_DEVICES = (4, 8)
EXCHANGES = ("ring", "gather")
LAYOUTS = ("in order", "zigzag")
NAMES = ("o", "dq", "dk", "dv")
HEADER = (
    f"{'length':>8} {'pattern':<9}{'exchange':<9}{'layout':<10}"
    f"{'ms f+b':>10}{'MiB':>9}{'one device':>12}{'x':>7}{'error':>10}"
)


class Case(NamedTuple):
    """Batch 1; causal where there are no buckets."""

    length: int
    heads: int
    head_dim: int
    dtype: str
    buckets: int

    @property
    def pattern(self) -> str:
        """Its name."""
        return f"hash{self.buckets}" if self.buckets else "causal"


Operands = tuple[jax.Array, ...]  # q, k, v, do, and bucket ids of queries and keys


def main() -> None:
    """Measures or counts, prints a table, writes JSON."""
    args = _arguments()
    if args.devices is not None:
        jax.config.update("jax_num_cpu_devices", args.devices)
    platform = jax.default_backend()
    result: dict[str, Any] = {"environment": environment()}
    name = "context-work" if args.count else f"context-{platform}"
    path = args.out or (None if args.quick else RESULTS / f"{name}.json")
    with written(result, path) as keep:
        if args.count:
            length = QUICK_LENGTH if args.quick else COUNTED_LENGTH
            result["work"] = work(length, args.buckets, COUNTED_DEVICES)
            return
        mesh = jax.make_mesh((args.devices or jax.device_count(),), ("sequence",), axis_types=(AxisType.Auto,))
        heads, head_dim, dtype = SHAPES[platform]
        result |= {"devices": mesh.size, "cases": []}
        print(f"{mesh.size} devices; MiB: peak of each, by the compiler's plan\n{HEADER}")
        for length in (QUICK_LENGTH,) if args.quick else args.lengths or LENGTHS[platform]:
            for buckets in args.buckets:
                _measure_case(Case(length, heads, head_dim, dtype, buckets), mesh, args, result["cases"])
                keep()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Times attention over sequences that are divided over devices.")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of a sequence; default those of the platform")
    parser.add_argument("--buckets", type=int, nargs="+", default=BUCKETS, help="numbers of them; 0 for causal")
    parser.add_argument("--exchanges", nargs="+", choices=EXCHANGES, default=EXCHANGES, help="how keys come to queries")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS, help="what devices hold")
    parser.add_argument("--devices", type=int, help="how many; default all. On a CPU, so many virtual ones")
    parser.add_argument("--check", action="store_true", help="compare with one device, where it fits on one")
    parser.add_argument("--count", action="store_true", help="count pairs and tiles instead, and time nothing")
    parser.add_argument("--quick", action="store_true", help="one tiny length, one sample")
    parser.add_argument("--samples", type=int, default=5, help="samples of which the median is taken")
    parser.add_argument("--implementation", help='"mosaic", "triton" or "xla"; default picks for the device')
    parser.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/context-PLATFORM.json")
    return parser.parse_args()


def _measure_case(case: Case, mesh: Mesh, args: argparse.Namespace, records: list[dict[str, Any]]) -> None:
    """Adds a record of each way, and prints it."""
    samples = 1 if args.quick else args.samples
    one_device = _one_device(case, args.implementation, samples) if args.check else None
    for exchange, layout in itertools.product(args.exchanges, args.layouts):
        zigzag = layout == "zigzag"
        context = sfj.Context("sequence", exchange, zigzag=zigzag, mesh=mesh)
        with beside():
            operands = _drawn(case, mesh, zigzag)
            compiled = _divided_step(case, context, args.implementation).lower(*operands).compile()
        record: dict[str, Any] = {
            **case._asdict(),
            "pattern": case.pattern,
            "exchange": exchange,
            "layout": layout,
            "memory_bytes": memory_bytes(compiled),
        }
        with alone():
            record["seconds"] = {"forward_backward": measure(compiled, *operands, samples=samples)._asdict()}
            if isinstance(one_device, str):
                record["one_device"] = one_device
            elif one_device is not None:
                record["seconds"]["one_device"], expected = one_device
                record["error"] = _errors(compiled(*operands), expected, mesh.size, zigzag)
        record["peak_bytes_in_use"] = _peak(mesh)
        records.append(record)
        print(_row(record), flush=True)


def _one_device(case: Case, implementation: str | None, samples: int) -> tuple[dict[str, Any], Operands] | str:
    """Seconds and results of one device, or why there are none."""
    mesh = jax.make_mesh((1,), ("sequence",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    try:
        with beside():
            operands = _drawn(case, mesh, zigzag=False)
            step = _whole_step(case, implementation).lower(*operands).compile()
        with alone():
            return measure(step, *operands, samples=samples)._asdict(), jax.device_get(step(*operands))
    except jax.errors.JaxRuntimeError as error:  # it does not fit
        return f"not run: {str(error).splitlines()[0][:120]}"


def _drawn(case: Case, mesh: Mesh, zigzag: bool) -> Operands:
    """Standard normal tensors and uniform bucket ids, the same whatever the mesh, each made where it belongs."""
    parts, sharding = mesh.size if zigzag else None, NamedSharding(mesh, PartitionSpec(None, "sequence"))
    shape = 1, case.length, case.heads
    normal = _drawing((*shape, case.head_dim), case.dtype, parts, sharding)
    ids = _drawing(shape, "int32", parts, sharding)
    *of_tensors, of_queries, of_keys = jax.random.split(jax.random.key(0), 6)
    buckets = max(1, case.buckets)
    return *(normal(key) for key in of_tensors), *(ids(key) % buckets for key in (of_queries, of_keys))


@functools.cache
def _drawing(shape: tuple[int, ...], dtype: str, parts: int | None, sharding: NamedSharding) -> jax.stages.Wrapped:
    """A function of a key, compiled once for all cases; with `parts`, it lays out what it draws in a zigzag."""

    def draw(key):
        if dtype == "int32":
            x = jax.random.randint(key, shape, 0, 1 << 30, jnp.int32)
        else:
            x = jax.random.normal(key, shape, jnp.dtype(dtype))
        return x if parts is None else sfj.to_zigzag(x, parts)

    return jax.jit(draw, out_shardings=sharding)


def _divided_step(case: Case, context: sfj.Context, implementation: str | None) -> jax.stages.Wrapped:
    def attend(q, k, v, *ids):
        return sfj.context_attention(q, k, v, sfj.Tokens(*ids), context, implementation=implementation)

    return _step(case, attend)


def _whole_step(case: Case, implementation: str | None) -> jax.stages.Wrapped:
    def attend(q, k, v, *ids):
        plan = sfj.hash_sparse(*ids, num_buckets=case.buckets) if ids else sfj.causal(case.length)
        return sfj.sparse_attention(q, k, v, plan, implementation=implementation)

    return _step(case, attend)


def _step(case: Case, attend: Callable[..., jax.Array]) -> jax.stages.Wrapped:
    """Forward and backward of operands, plans included."""

    def step(q, k, v, do, *ids):
        o, pull_back = jax.vjp(lambda q, k, v: attend(q, k, v, *(ids if case.buckets else ())), q, k, v)
        return o, *pull_back(do)

    return jax.jit(step)


def _errors(got: Operands, expected: Operands, parts: int, zigzag: bool) -> dict[str, float]:
    """The largest difference of each result over its largest value, by the devices that hold it."""
    laid_out = parts if zigzag else None
    return {
        name: float(_error(x, jax.device_put(y, x.sharding), parts=laid_out))
        for name, x, y in zip(NAMES, got, expected, strict=True)
    }


@functools.partial(jax.jit, static_argnames="parts")
def _error(x: jax.Array, y: jax.Array, *, parts: int | None) -> jax.Array:
    y = y if parts is None else sfj.to_zigzag(y, parts)
    x, y = x.astype("float32"), y.astype("float32")
    return abs(x - y).max() / abs(y).max()


def _peak(mesh: Mesh) -> int | None:
    """The most bytes that any device has held since the process began; None where the backend does not tell."""
    stats = [device.memory_stats() for device in mesh.devices.flat]
    return max((s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s), default=None)


def _row(record: dict[str, Any]) -> str:
    ms = {name: 1e3 * timing["median"] for name, timing in record["seconds"].items()}
    cells = [f"{record['length']:>8} {record['pattern']:<9}{record['exchange']:<9}{record['layout']:<10}"]
    cells.append(f"{ms['forward_backward']:>10.2f}{record['memory_bytes']['peak'] / 2**20:>9.0f}")
    if "error" in record:
        one, error = ms["one_device"], max(record["error"].values())
        cells.append(f"{one:>12.2f}{one / ms['forward_backward']:>7.2f}{error:>10.1e}")
    elif "one_device" in record:
        cells.append(f"  {record['one_device']}")
    return "".join(cells)


if __name__ == "__main__":
    main()
