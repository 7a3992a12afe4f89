"""The settings in which coverage is compared, and the calls that are timed in them.

A setting says how many buckets there are at a length, and how long chunks are. The calls are ours and Reformer's, from
queries and values, and dense attention.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from passes import Call, memory_bytes
from reformer import chunk_size, hash_rounds, reformer_attention
from timing import alone, beside, measure

from sparse_flash_jax.flax.heads import attend
from sparse_flash_jax.flax.pattern import Hash
from sparse_flash_jax.flax.shared_keys import normalise

BUCKETS = 16  # the paper's, arXiv 2306.01160
FIXED_CHUNK = 64  # of the code published with Reformer
TOKENS_OF_A_BUCKET = 512
TOKENS, HEADS, HEAD_DIM = {"cpu": 1, "gpu": 32_768}, {"cpu": 4, "gpu": 12}, 64  # of a batch; a longer sequence alone
DTYPES = {"cpu": "float32", "gpu": "bfloat16"}
CPU_LENGTH = 4096  # the longest that is timed there: T x T arrays of dense attention
SPEED_ROUNDS = {"fixed": (1, 4), "rule": (1,), "growing": (1,)}


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


class SpeedCase(NamedTuple):
    """One scheme at one length; dense attention has no setting."""

    scheme: Literal["ours", "reformer", "dense"]
    setting: Setting | None
    rounds: int
    length: int
    platform: str

    def __str__(self) -> str:
        return self.scheme if self.setting is None else f"{self.scheme}-{self.setting.name}-{self.rounds}"


def speed_cases(
    settings: Sequence[Setting], rounds: Sequence[int], lengths: Sequence[int], platform: str
) -> list[SpeedCase]:
    """Returns what is timed; buckets of "fixed" and "rule" are the same, so that ours is not timed in the latter."""
    cases = []
    for length in lengths if platform == "gpu" else [length for length in lengths if length <= CPU_LENGTH]:
        cases.append(SpeedCase("dense", None, 1, length, platform))
        for setting in settings:
            for number in [number for number in SPEED_ROUNDS[setting.name] if number in rounds]:
                cases.append(SpeedCase("reformer", setting, number, length, platform))
                if setting.name != "rule":
                    cases.append(SpeedCase("ours", setting, number, length, platform))
    return cases


def timed_cases(cases: list[SpeedCase], samples: int) -> Iterator[dict[str, Any]]:
    """Times forward + backward of each, compiled side by side while none is timed. One that cannot run says why."""
    with ThreadPoolExecutor() as threads:
        compiled = [threads.submit(_compiled, _call(case)) for case in cases]
        for case, future in zip(cases, compiled, strict=True):
            record: dict[str, Any] = {"scheme": str(case), "length": case.length, "batch": _batch(case)}
            if case.setting is not None:
                sizes = {"buckets": case.setting.buckets(case.length), "chunk": case.setting.chunk(case.length)}
                record |= {"setting": case.setting.name, "rounds": case.rounds, **sizes}
            try:
                call, args = future.result()
                with alone():
                    record["seconds"] = measure(call, *args, samples=samples)._asdict()
                record["memory_bytes"] = memory_bytes(call)
            except (jax.errors.JaxRuntimeError, NotImplementedError) as error:  # out of memory
                record["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            yield record


def _compiled(call: Call) -> tuple[jax.stages.Compiled, tuple[Any, ...]]:
    with beside():
        return call.compile(), call.args


def _batch(case: SpeedCase) -> int:
    return max(1, TOKENS[case.platform] // case.length)


def _call(case: SpeedCase) -> Call:
    """Forward and backward of a function of (key, q, v): o, dq, dv. Keys are the queries, normalised."""
    q, v, do = _tensors((_batch(case), case.length, HEADS[case.platform], HEAD_DIM), DTYPES[case.platform])

    def attention(key, q, v):
        if case.setting is None:
            backend = "cudnn" if case.platform == "gpu" else "xla"
            return jax.nn.dot_product_attention(q, normalise(q), v, is_causal=True, implementation=backend)
        num_buckets, chunk = case.setting.buckets(case.length), case.setting.chunk(case.length)
        if case.scheme == "ours":
            return attend(Hash(num_buckets, exclude_self=True, rounds=case.rounds), q, None, v, key=key)[0]
        return reformer_attention(q, normalise(q), v, hash_rounds(q, num_buckets, key, case.rounds), chunk=chunk)

    def step(key, q, v, do):
        o, pull_back = jax.vjp(lambda q, v: attention(key, q, v), q, v)
        return o, *pull_back(do)

    return Call(jax.jit(step), (jax.random.key(1), q, v, do))


@functools.cache
def _tensors(shape: tuple[int, ...], dtype: str) -> list[jax.Array]:
    """Standard normal ones."""
    return [jax.random.normal(key, shape, jnp.dtype(dtype)) for key in jax.random.split(jax.random.key(0), 3)]
