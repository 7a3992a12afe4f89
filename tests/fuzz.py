"""Random cases of sparse attention against the dense reference, any number of them; `tests/cases.py` has the named.

python tests/fuzz.py --cases 2000 --device cpu                     in Pallas' interpreter where there are GPU kernels
python tests/fuzz.py --cases 2000 --device gpu                     compiled
python tests/fuzz.py --seed 0 --first 17 --cases 1 --device cpu    one case again

Each case follows from the seed and its number alone. Cases share a `Form`, which is all that is compiled for, with
those of numbers near theirs; what a compiled function is given is drawn afresh for each.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, it finds the package and the tests

import jax
import jax.numpy as jnp
import numpy as np

import sparse_flash_jax as sfj
from sparse_flash_jax.kernels.config import Blocks, Config, mosaic_config, triton_config
from sparse_flash_jax.plan import repeat_heads
from tests import cases, definition
from tests.budget import Results, assert_within_budget, dense, truth, with_gradients
from tests.cases import Arrays, Case, Pattern, Shape

# Those that a device runs unless others are named.
IMPLEMENTATIONS = {
    "cpu": ("xla", "triton"),
    "gpu": ("mosaic", "triton"),
}
CASES_OF_A_FORM = 20
ORACLE_PAIRS = 150_000  # pairs of a query and a key that the oracle, a loop in Python, judges in about 30 ms
SECONDS_BETWEEN_LINES = 10.0
FARTHEST = 2**30  # the largest offset


class Limits(NamedTuple):
    """The largest sizes drawn."""

    length: int
    head_dim: int
    key_heads: int
    members: int
    """Query heads of a key head."""


LIMITS = {"cpu": Limits(200, 40, 2, 3), "gpu": Limits(1500, 256, 4, 4)}
MOST_BUCKETS = 128
HEAD_DIMS = (16, 32, 48, 64, 80, 96, 128, 192, 256)  # those that models have


class Form(NamedTuple):
    """What is static about a case."""

    case: Case
    """Its pattern has a rule and capacities, and no arrays."""
    groups: tuple[str, ...]
    """For each array of group ids, "documents" or "buckets"."""
    keeps: tuple[str, ...]
    """Names of keep masks."""
    narrow: tuple[tuple[str, int | None, int | None], ...]
    """Arrays by name, and how many batch entries and heads of them are left: 1, or None for all."""
    offset: bool
    """Whether cases may have an offset; without one, GPUs count known buckets, and tokens that are but dropped."""
    scale: float | None
    tiles: Config | None


def draw_form(seed: int, number: int, device: str) -> Form:
    """The form of cases from `CASES_OF_A_FORM * number` on."""
    rng, limits = np.random.default_rng([seed, number, 0]), LIMITS[device]
    shape = _draw_shape(rng, limits)
    dtype = str(rng.choice(["float32", "float16", "bfloat16"]))
    groups = _pick(rng, (), ("buckets",), ("documents",), ("documents", "buckets"), ("buckets", "buckets"))
    either = _pick(rng, (), ("query_keep", "key_keep"), ("query_keep",), ("key_keep",))
    keeps = either if groups or len(either) != 1 else ("query_keep", "key_keep")
    causal, exclude_self, capacities = True, False, (None, None)
    if groups or keeps:  # else the plan is that of `sfj.causal`, which knows a window alone
        causal = rng.random() < 0.75
        exclude_self = causal and rng.random() < 0.3
        # A quarter past the length, where they should do nothing.
        lengths = (shape.T, shape.keys)
        capacities = tuple(int(rng.integers(1, n * 5 // 4 + 2)) if rng.random() < 0.25 else None for n in lengths)
    offset = rng.random() < 0.5
    known = groups == ("buckets",) and rng.random() < 0.5
    window = _pick(rng, None, None, int(rng.integers(1, 20)), int(rng.integers(1, shape.keys + 2)), 2**40)
    pattern = Pattern(
        f"seed{seed}",
        causal=causal,
        exclude_self=exclude_self,
        window=window,
        query_capacity=capacities[0],
        key_capacity=capacities[1],
        num_buckets=MOST_BUCKETS if known else None,
    )
    names = ("query_group", "key_group", "query_keep", "key_keep")
    narrow = tuple((name, _pick(rng, None, None, None, 1), _pick(rng, None, None, None, 1)) for name in names)
    scale = _pick(rng, None, None, 0.0, *(factor / math.sqrt(shape.H) for factor in (0.3, -1.3, 2.0)))
    tiles = (
        Config(_draw_blocks(rng), _draw_blocks(rng), _draw_blocks(rng))
        if device == "cpu" and rng.random() < 0.5
        else None
    )
    return Form(Case(shape, pattern, dtype), groups, keeps, narrow, offset, scale, tiles)


def draw_case(seed: int, index: int, form: Form) -> Case:
    """A case of the form, with arrays and an offset of its own."""
    rng, shape, pattern = np.random.default_rng([seed, index, 1]), form.case.shape, form.case.pattern
    near = int(rng.integers(-shape.T, shape.keys + 1))
    offset = _pick(rng, 0, shape.keys - shape.T, near, near, FARTHEST, -FARTHEST) if form.offset else 0
    skews = {"documents": lambda: cases.documents, "buckets": lambda: _draw_skew(rng, pattern.num_buckets is not None)}
    groups = [skews[kind]() for kind in form.groups]
    kept = cases.kept(*(_pick(rng, 1.0, float(rng.random()), float(rng.random()), 0.0) for _ in range(2)))

    def arrays(rng: np.random.Generator, shape: Shape) -> Arrays:
        ids, keep = [group(rng, shape) for group in groups], kept(rng, shape)
        drawn: Arrays = {name: tuple(x[name] for x in ids) for name in ("query_group", "key_group") if ids}
        drawn |= {name: keep[name] for name in form.keeps}
        for name, batch, heads in form.narrow:
            if name in drawn:
                drawn[name] = jax.tree.map(lambda x, b=batch, a=heads: x[:b, :, :a], drawn[name])
        return drawn

    name = f"{pattern.name}_case{index}"
    return dataclasses.replace(
        form.case, pattern=dataclasses.replace(pattern, name=name, arrays=arrays, query_offset=offset)
    )


def _pick[Value](rng: np.random.Generator, *values: Value) -> Value:
    return values[rng.integers(len(values))]


def _draw_shape(rng: np.random.Generator, limits: Limits) -> Shape:
    def length() -> int:
        log = math.exp(rng.uniform(0, math.log(limits.length)))
        return round(_pick(rng, log, rng.uniform(1, limits.length)))

    queries = length()
    any_dim = int(rng.integers(1, limits.head_dim + 1))
    head_dim = _pick(rng, any_dim, int(rng.choice([h for h in HEAD_DIMS if h <= limits.head_dim])))
    key_heads = int(rng.integers(1, limits.key_heads + 1))
    heads = key_heads * int(rng.integers(1, limits.members + 1))
    keys = _pick(rng, None, None, length())
    return Shape(B=_pick(rng, 1, 2), T=queries, N=heads, H=head_dim, K=key_heads, S=keys)


def _draw_blocks(rng: np.random.Generator) -> Blocks:
    return Blocks(*(int(rng.choice([16, 32, 64])) for _ in range(2)))


def _draw_skew(rng: np.random.Generator, known: bool) -> Callable[[np.random.Generator, Shape], Arrays]:
    """A way to draw bucket ids; known ones are in [0, MOST_BUCKETS)."""
    count = int(2 ** rng.uniform(0, math.log2(MOST_BUCKETS)))
    usual = (cases.buckets(count), cases.half_in_one(count), zipf(count))
    any_ids = () if known else (cases.own_bucket, cases.one_sided, cases.extreme_ids)
    return _pick(rng, *usual, *usual, *any_ids)


def zipf(count: int) -> Callable[[np.random.Generator, Shape], Arrays]:
    """Random bucket ids, the i-th most frequent in proportion to 1 / i."""

    def arrays(rng: np.random.Generator, shape: Shape) -> Arrays:
        shares = 1 / np.arange(1, count + 1)
        axes = {"query_group": shape.query_axes, "key_group": shape.key_axes}
        return {name: rng.choice(count, x, p=shares / shares.sum()).astype(np.int32) for name, x in axes.items()}

    return arrays


# Compiling is most of the time. On a CPU code that runs a few times need not be fast; on a GPU kernels are compiled as
# always, and there is no search for the fastest of products.
COMPILER_OPTIONS = {"cpu": {"xla_backend_optimization_level": 0}, "gpu": {"xla_gpu_autotune_level": 0}}


@functools.lru_cache(maxsize=64)
def _compiled(function: Callable, device: str, statics: int, form: Form) -> Callable:
    """The function under jit for a form; so many of its first arguments are static.

    Of the forms of a long run the last ones alone are kept: some hundreds take all the memory maps that Linux allows.
    """

    def own(*args: Any) -> Any:
        return function(*args)

    return jax.jit(own, static_argnums=tuple(range(statics)), compiler_options=COMPILER_OPTIONS[device])


def _plan(form: Form, arrays: Arrays, offset: jax.Array) -> sfj.AttentionPlan:
    """Compiled with the offset unknown, so that tokens beyond a capacity are dropped and nothing is raised."""
    start = offset if form.offset else 0
    traced = dataclasses.replace(form.case.pattern, arrays=lambda *_: arrays, query_offset=start)
    return dataclasses.replace(form.case, pattern=traced).plan()


def _sparse(scale, implementation, config, inputs, plan):
    options = {"scale": scale, "implementation": implementation, "config": config, "return_residual": True}
    return with_gradients(lambda q, k, v: sfj.sparse_attention(q, k, v, plan, **options), inputs)


def _judges(scale, inputs, plan):
    """The truth, a peer for the error budget, and the mask.

    In a short dtype the error of dense attention alone is too small a budget where a tensor has few elements, or a
    query sees few keys: 13 of 400 right cases were beyond it. So the peer also errs by a rounding of each output, and
    by what all flash attention does, whose backward pass has o rounded: that errs in delta, as a cotangent of lse does,
    by the norm of o's roundings times do. (The sum of one set of roundings may by chance be nearly 0.) And float32 sums
    of n terms, one after another, err as if sqrt(n / 2) roundings befell each: dp and delta, which is taken from it, of
    H products each, and the outputs of as many as there are keys, or queries.
    """
    batch, length, heads, head_dim = inputs.q.shape
    mask = jnp.broadcast_to(repeat_heads(plan.mask(), heads), (batch, heads, length, inputs.k.shape[1]))
    exact, plain = truth(inputs, mask, scale), dense(inputs, mask, scale)
    roundings = _rounding(exact.o, inputs.q.dtype) + math.sqrt(head_dim) * _rounding(exact.o, jnp.dtype(jnp.float32))
    delta_error = jnp.linalg.norm(roundings * inputs.do.astype(jnp.float32), axis=-1)
    flash = truth(inputs._replace(dlse=inputs.dlse - delta_error), mask, scale)
    keys, queries = inputs.k.shape[1], length * heads // inputs.k.shape[2]
    terms = Results(o=keys, lse=keys, dq=keys, dk=queries, dv=queries)
    return exact, jax.tree.map(_worst, exact, plain, flash, terms), mask


def _rounding(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jnp.abs(x) * (float(jnp.finfo(dtype).eps) / 2)


def _worst(exact: jax.Array, plain: jax.Array, flash: jax.Array, terms: int) -> jax.Array:
    errors = (
        _rounding(exact, plain.dtype),
        math.sqrt(terms / 2) * _rounding(exact, exact.dtype),
        jnp.abs(plain.astype(jnp.float32) - exact),
        jnp.abs(flash - exact),
    )
    return exact + functools.reduce(jnp.maximum, errors)


def _config(form: Form, device: str, implementation: str) -> Config | None:
    if device == "gpu" or implementation == "xla":
        return form.tiles
    if implementation == "mosaic":
        return dataclasses.replace(mosaic_config(form.case.shape.H, long_runs=not form.groups), interpret=True)
    default = triton_config(form.case.dtype, form.case.shape.H, long_runs=False, capability=9.0)
    return dataclasses.replace(form.tiles or default, interpret=True)


def takes(implementation: str, form: Form) -> bool:
    """Whether an implementation is there for the form's dtype."""
    return implementation != "mosaic" or form.case.dtype != "float32"


def wrongs(form: Form, case: Case, device: str, implementations: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """What is wrong with a case, and the implementations of which this is said."""
    try:
        inputs, arrays = case.inputs(), jax.tree.map(jnp.asarray, case.arrays())
        plan = _compiled(_plan, device, 1, form)(form, arrays, jnp.int32(case.pattern.query_offset))
        exact, peer, mask = _compiled(_judges, device, 1, form)(form.scale, inputs, plan)
        if mask.size <= ORACLE_PAIRS:
            seen = definition.visible.__wrapped__(case)  # not remembered: there are many cases
            np.testing.assert_array_equal(mask, seen, "mask of the plan")
    except Exception as error:
        yield " ".join(implementations), _one_line(error)
        return
    for implementation in implementations:
        try:
            config = _config(form, device, implementation)
            got = _compiled(_sparse, device, 3, form)(form.scale, implementation, config, inputs, plan)
            assert_within_budget(got, exact, peer)
        except Exception as error:
            yield implementation, _one_line(error)


def _one_line(error: Exception) -> str:
    kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())[:240]


def judge(args: argparse.Namespace, number: int, indices: list[int]) -> list[tuple[list[str], tuple[str, ...]]]:
    """For each of these cases, all of one form: a line for each thing that is wrong, and which implementations ran."""
    judged = []
    with jax.default_device(jax.devices(args.device)[0]):
        form = draw_form(args.seed, number, args.device)
        ran = tuple(name for name in args.implementation if takes(name, form))
        for index in indices:
            case = draw_case(args.seed, index, form)
            lines = [
                f"wrong: {case}: {names}: {what}; again: python tests/fuzz.py --seed {args.seed} --first {index} "
                f"--cases 1 --device {args.device} --implementation {names}"
                for names, what in wrongs(form, case, args.device, ran)
            ]
            judged.append((lines, ran))
    return judged


def all_judged(
    args: argparse.Namespace, forms: list[tuple[int, list[int]]]
) -> Iterator[list[tuple[list[str], tuple[str, ...]]]]:
    """What `judge` says of each form, as it is done. In processes, since most of compiling is Python."""
    if min(args.jobs, len(forms)) <= 1:
        yield from (judge(args, *form) for form in forms)
        return
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # they share a GPU's memory
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(args.jobs, len(forms)), context) as pool:
        for done in concurrent.futures.as_completed([pool.submit(judge, args, *form) for form in forms]):
            yield done.result()


class Tally:
    """Counts cases and prints what is wrong; now and then how far it is."""

    def __init__(self, cases: int):
        self.cases, self.done, self.wrong = cases, 0, 0
        self.ran: collections.Counter[str] = collections.Counter()
        self.start = self.last_line = time.monotonic()

    def add(self, lines: list[str], ran: tuple[str, ...]) -> None:
        self.done += 1
        self.ran.update(ran)
        self.wrong += bool(lines)
        for line in lines:
            print(line, flush=True)
        if time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            print(f"{self.done} of {self.cases} cases, {self.wrong} wrong, {self.seconds:.0f} s", flush=True)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Judges sparse attention on random cases.")
    parser.add_argument("--cases", type=int, default=200, help="how many")
    parser.add_argument("--device", choices=tuple(IMPLEMENTATIONS), default="cpu")
    known = sorted({name for names in IMPLEMENTATIONS.values() for name in names})
    parser.add_argument("--implementation", nargs="+", choices=known, help="default: those of the device")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="forms compiled at a time")
    args = parser.parse_args(argv)
    args.implementation = tuple(args.implementation or IMPLEMENTATIONS[args.device])
    return args


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 if a case is wrong."""
    args = _arguments(argv)
    tally = Tally(args.cases)
    indices = range(args.first, args.first + args.cases)
    forms = [(n, list(some)) for n, some in itertools.groupby(indices, lambda i: i // CASES_OF_A_FORM)]
    for judged in all_judged(args, forms):
        for lines, names in judged:
            tally.add(lines, names)
    ran = ", ".join(f"{name} {count}" for name, count in tally.ran.items())
    print(f"{args.cases} cases ({ran}), {tally.wrong} wrong, {tally.seconds:.0f} s")
    return int(tally.wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
