"""The named cases of tests and benchmarks: shapes, a pattern and a dtype, filled from a seed by numpy.

`CASES` are small and odd, `BENCHMARKS` large and plain. A case knows nothing of how a plan is made: it hands out the
arguments of `make_plan`, which the oracle reads too.
"""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import sparse_flash_jax as sfj

SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
Arrays = dict[str, Any]  # by names of `make_plan`: numpy arrays, or tuples of them where a group is of several ids


class Shape(NamedTuple):
    """B batch, T queries, N query heads, H head dim; S keys and K key heads, where None means T and N."""

    B: int
    T: int
    N: int
    H: int
    K: int | None = None
    S: int | None = None

    @property
    def keys(self) -> int:
        return self.T if self.S is None else self.S

    @property
    def key_heads(self) -> int:
        return self.N if self.K is None else self.K

    @property
    def query_axes(self) -> tuple[int, int, int]:
        return self.B, self.T, self.N

    @property
    def key_axes(self) -> tuple[int, int, int]:
        return self.B, self.keys, self.key_heads


@dataclasses.dataclass(frozen=True)
class Pattern:
    """What is visible: arrays (groups and keep masks by their names in `make_plan`) and a rule."""

    name: str
    arrays: Callable[[np.random.Generator, Shape], Arrays] = lambda rng, shape: {}
    causal: bool = True
    exclude_self: bool = False
    window: int | None = None
    query_offset: int = 0
    query_capacity: int | None = None
    key_capacity: int | None = None
    num_buckets: int | None = None
    """Of ids that are known to be in [0, num_buckets)."""

    @property
    def rule(self) -> dict[str, Any]:
        """The arguments of `make_plan` that decide visibility within a group."""
        return {f: getattr(self, f) for f in ("causal", "exclude_self", "window", "query_offset")}

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of `make_plan` that are not arrays and decide what is visible."""
        return {**self.rule, "query_capacity": self.query_capacity, "key_capacity": self.key_capacity}


class Inputs(NamedTuple):
    """Arguments of attention, and cotangents of o and lse."""

    q: Array
    k: Array
    v: Array
    do: Array
    dlse: Array


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes, pattern and dtype; everything else follows from its name."""

    shape: Shape
    pattern: Pattern
    dtype: str = "float32"

    def __str__(self) -> str:
        s = self.shape
        sizes = {"B": s.B, "T": s.T, "S": s.S, "N": s.N, "K": s.K, "H": s.H}
        named = "-".join(f"{name}{size}" for name, size in sizes.items() if size is not None)
        return f"{named}-{self.pattern.name}-{SHORT[self.dtype]}"

    def in_16_bits(self) -> "Case":
        """The case for kernels that have no float32."""
        return dataclasses.replace(self, dtype="float16") if self.dtype == "float32" else self

    def _generator(self, purpose: int) -> np.random.Generator:
        return np.random.default_rng([zlib.crc32(str(self).encode()), purpose])

    def arrays(self) -> Arrays:
        """Groups and keep masks, int32 or bool [B|1 T N|1] and [B|1 S K|1]; none for one group with nothing dropped."""
        return self.pattern.arrays(self._generator(0), self.shape)

    def plan_arguments(self) -> dict[str, Any]:
        """The keyword arguments of `make_plan`, which wants groups or keep masks among them."""
        return {
            **jax.tree.map(jnp.asarray, self.arrays()),
            **self.pattern.options,
            "num_buckets": self.pattern.num_buckets,
        }

    def plan(self) -> sfj.AttentionPlan:
        """The plan; `sfj.causal` where nothing is grouped or dropped."""
        arguments = self.plan_arguments()
        if "query_group" in arguments or "query_keep" in arguments:
            return sfj.make_plan(**arguments)
        return sfj.causal(self.shape.T, self.shape.keys, self.pattern.query_offset, window=self.pattern.window)

    def inputs(self) -> Inputs:
        """q, k, v and the cotangents of o (in the case's dtype) and of lse (float32), all standard normal."""
        s, rng, dtype = self.shape, self._generator(1), jnp.dtype(self.dtype)
        q_shape, k_shape = (*s.query_axes, s.H), (*s.key_axes, s.H)
        drawn = [rng.standard_normal(shape, np.float32) for shape in (q_shape, k_shape, k_shape, q_shape)]
        dlse = jnp.asarray(rng.standard_normal(s.query_axes, np.float32))
        q, k, v, do = (jnp.asarray(x, dtype) for x in drawn)
        return Inputs(q, k, v, do, dlse)


def buckets(count: int) -> Callable[[np.random.Generator, Shape], Arrays]:
    """Random bucket ids, independent for queries and keys."""

    def arrays(rng: np.random.Generator, shape: Shape) -> Arrays:
        return {
            "query_group": rng.integers(0, count, shape.query_axes, np.int32),
            "key_group": rng.integers(0, count, shape.key_axes, np.int32),
        }

    return arrays


def own_bucket(rng: np.random.Generator, shape: Shape) -> Arrays:
    """Each position a bucket of its own, in a random order of ids, the same for queries and keys."""
    ids = rng.permutation(max(shape.T, shape.keys)).astype(np.int32)[None, :, None]
    return {
        "query_group": np.broadcast_to(ids[:, : shape.T], shape.query_axes),
        "key_group": np.broadcast_to(ids[:, : shape.keys], shape.key_axes),
    }


def one_sided(rng: np.random.Generator, shape: Shape) -> Arrays:
    """Buckets 0..3 for queries and 1, 3, 5 for keys, so that some are empty on one side."""
    arrays = buckets(4)(rng, shape)
    return {**arrays, "key_group": 1 + 2 * rng.integers(0, 3, shape.key_axes, np.int32)}


def extreme_ids(rng: np.random.Generator, shape: Shape) -> Arrays:
    """Group ids at the ends of int32 and at their neighbours."""
    ids = np.array([-(2**31), -(2**31) + 1, -1, 0, 1, 2**31 - 2, 2**31 - 1], np.int32)
    return {"query_group": rng.choice(ids, shape.query_axes), "key_group": rng.choice(ids, shape.key_axes)}


def kept(
    query_share: float, key_share: float, *, exact: bool = False
) -> Callable[[np.random.Generator, Shape], Arrays]:
    """Random keep masks; `exact` keeps the same number in every head."""

    def mask(rng: np.random.Generator, axes: tuple[int, int, int], share: float) -> np.ndarray:
        score = rng.random(axes)
        return np.argsort(np.argsort(score, axis=1), axis=1) < round(share * axes[1]) if exact else score < share

    def arrays(rng: np.random.Generator, shape: Shape) -> Arrays:
        return {
            "query_keep": mask(rng, shape.query_axes, query_share),
            "key_keep": mask(rng, shape.key_axes, key_share),
        }

    return arrays


def documents(rng: np.random.Generator, shape: Shape) -> Arrays:
    """About four documents of random lengths in each batch entry, as `packed` gives them: head axes of size 1."""
    length = max(shape.T, shape.keys)
    ids = np.cumsum(rng.random((shape.B, length, 1)) < 4 / length, axis=1).astype(np.int32)
    return {"query_group": ids[:, : shape.T], "key_group": ids[:, : shape.keys]}


def documents_buckets_kept(rng: np.random.Generator, shape: Shape) -> Arrays:
    """Documents, three buckets in each, and half the tokens dropped."""
    ids, bucket = documents(rng, shape), buckets(3)(rng, shape)
    return {**{name: (ids[name], bucket[name]) for name in ids}, **kept(0.5, 0.6)(rng, shape)}


def broadcast_axes(rng: np.random.Generator, shape: Shape) -> Arrays:
    """Axes of size 1 in every place: groups without heads, queries kept by head, keys kept by batch entry."""
    return {
        "query_group": rng.integers(0, 3, (1, shape.T, 1), np.int32),
        "key_group": rng.integers(0, 3, (shape.B, shape.keys, 1), np.int32),
        "query_keep": rng.random((1, shape.T, shape.N)) < 0.7,
        "key_keep": rng.random((shape.B, shape.keys, 1)) < 0.7,
    }


def key_heads_only(rng: np.random.Generator, shape: Shape) -> Arrays:
    """Keys differ by head and queries do not."""
    arrays = buckets(3)(rng, shape)
    return {**arrays, "query_group": arrays["query_group"][:1, :, :1]}


def crossed_segments(rng: np.random.Generator, shape: Shape) -> Arrays:
    """Segments of queries and keys that cross: the published code of arXiv 2306.01160 skips live tiles here."""
    query = (np.arange(shape.T) < shape.T // 4).astype(np.int32)[None, :, None]
    key = (np.arange(shape.keys) >= shape.keys // 2 + 64).astype(np.int32)[None, :, None]
    return {
        "query_group": np.broadcast_to(query, shape.query_axes),
        "key_group": np.broadcast_to(key, shape.key_axes),
    }


causal = Pattern("causal")
window9 = Pattern("window9", window=9)
hash16 = Pattern("hash16", buckets(16), num_buckets=16)
hash4 = Pattern("hash4", buckets(4))
qk50 = Pattern("qk50", kept(0.5, 0.5))
packed = Pattern("packed", documents)
everything = Pattern("packed_hash3_qk50", documents_buckets_kept)

BASE = Shape(B=2, T=63, N=4, K=2, H=32)
# One shape for most patterns: they then share their compiled kernels.
_OF_BASE = (
    causal,
    window9,
    hash16,
    qk50,
    packed,
    everything,
    dataclasses.replace(everything, name="packed_hash3_qk50_window9", window=9),
    dataclasses.replace(packed, name="packed_window5", window=5),
    dataclasses.replace(packed, name="packed_both_ways", causal=False),
    Pattern("hash4_window9", buckets(4), window=9, num_buckets=4),
    Pattern("hash4_window_past_end", buckets(4), window=2**40),
    Pattern("hash4_exclude_self", buckets(4), exclude_self=True, num_buckets=4),
    Pattern("hash4_exclude_self_window9", buckets(4), exclude_self=True, window=9),
    Pattern("hash4_both_ways", buckets(4), causal=False, num_buckets=4),
    Pattern("hash4_both_ways_window9", buckets(4), causal=False, window=9),
    Pattern("hash4_offset_7", buckets(4), query_offset=7),
    Pattern("hash4_offset_minus_20", buckets(4), query_offset=-20),
    Pattern("hash4_offset_most", buckets(4), query_offset=2**30),
    Pattern("hash4_offset_least", buckets(4), query_offset=-(2**30)),
    Pattern("hash4_both_ways_window9_offset_least", buckets(4), causal=False, window=9, query_offset=-(2**30)),
    Pattern("hash4_window_past_end_offset_most", buckets(4), window=2**40, query_offset=2**30),
    Pattern("window9_qk50", kept(0.5, 0.5), window=9),
    Pattern("one_bucket", buckets(1)),
    Pattern("own_bucket", own_bucket),
    Pattern("lonely", own_bucket, exclude_self=True),
    Pattern("one_sided", one_sided),
    Pattern("extreme_ids", extreme_ids),
    Pattern("no_queries", kept(0, 0.5)),
    Pattern("no_keys", kept(0.5, 0)),
    Pattern("nothing_kept", kept(0, 0)),
    Pattern("broadcast_axes", broadcast_axes),
    Pattern("key_heads_only", key_heads_only),
    Pattern("qk50_capacities", kept(0.5, 0.25, exact=True), query_capacity=32, key_capacity=16),
    Pattern("both_ways", kept(1, 1), causal=False),
)
# Shapes and dtypes: each of these compiles kernels of its own.
_OF_SHAPES = (
    Case(Shape(B=1, T=1, N=1, H=1), causal),
    Case(Shape(B=1, T=1, N=1, H=1), Pattern("lonely", own_bucket, exclude_self=True)),
    Case(Shape(B=1, T=1, S=64, N=2, K=1, H=8), Pattern("causal_offset_63", query_offset=63)),
    Case(Shape(B=1, T=5, S=64, N=2, K=1, H=8), Pattern("window9_offset_59", query_offset=59, window=9)),
    Case(Shape(B=1, T=40, S=70, N=3, H=48), hash4),
    Case(Shape(B=1, T=70, S=40, N=3, H=48), hash4),
    Case(Shape(B=1, T=70, S=40, N=3, H=48), causal),
    Case(Shape(B=1, T=33, N=6, K=3, H=96), qk50),
    Case(Shape(B=1, T=33, N=4, K=1, H=256), hash4),
    Case(Shape(B=1, T=300, S=270, N=2, H=16), Pattern("hash2", buckets(2))),
    Case(Shape(B=1, T=1024, N=1, H=32), Pattern("crossed_segments", crossed_segments)),
    *(
        Case(BASE, pattern, dtype)
        for dtype in ("float16", "bfloat16")
        for pattern in (causal, hash16, qk50, everything)
    ),
)

CASES = (*(Case(BASE, pattern) for pattern in _OF_BASE), *_OF_SHAPES)
# Those that kernels can tell apart: by shape, and of one shape by the axes of bounds and by what sees nothing.
_DISTINCT = ("causal", "hash16", "packed", "broadcast_axes", "key_heads_only", "no_keys", "both_ways", "lonely")
TOLD_APART = tuple(
    case for case in CASES if case.shape != BASE or (case.dtype == "float32" and case.pattern.name in _DISTINCT)
)
BY_NAME = {str(case): case for case in CASES}


def buckets_pattern(count: int) -> Pattern:
    """So many random buckets."""
    return Pattern(f"hash{count}", buckets(count), num_buckets=count)


def dropping(percent: int, length: int) -> Pattern:
    """Named for the share of queries, and of keys, that is dropped, as in arXiv 2306.01160."""
    share = 1 - percent / 100
    fits = round(share * length)
    return Pattern(f"qk{percent}", kept(share, share, exact=True), query_capacity=fits, key_capacity=fits)


def half_in_one(count: int) -> Callable[[np.random.Generator, Shape], Arrays]:
    """Random bucket ids of which half are 5: the skew that a hash makes of alike tokens."""

    def arrays(rng: np.random.Generator, shape: Shape) -> Arrays:
        drawn = buckets(count)(rng, shape)
        return {name: np.where(rng.random(x.shape) < 0.5, np.int32(5), x) for name, x in drawn.items()}

    return arrays


_GPU = [(8192, 4), (16384, 2), (32768, 1)]
BENCHMARKS = (
    *(Case(Shape(B=1, T=t, N=4, H=64), hash16) for t in (4096, 8192, 16384, 32768)),
    *(
        Case(Shape(B=1, T=8192, N=4, H=64), pattern)
        for pattern in (causal, Pattern("window256", window=256), buckets_pattern(64), dropping(50, 8192))
    ),
    *(
        Case(Shape(B=b, T=t, N=12, H=64), pattern, "bfloat16")
        for t, b in _GPU
        for pattern in (
            causal,
            Pattern("window1024", window=1024),
            hash16,
            buckets_pattern(64),
            Pattern("skewed16", half_in_one(16), num_buckets=16),
            Pattern("one_bucket", buckets(1), num_buckets=1),
            *(dropping(percent, t) for percent in (30, 50, 70)),
            packed,
        )
    ),
    Case(Shape(B=8, T=4096, N=12, H=64), causal, "bfloat16"),
    Case(Shape(B=1, T=65536, N=12, H=64), causal, "bfloat16"),
    Case(Shape(B=1, T=65536, N=12, H=64), buckets_pattern(64), "bfloat16"),
    *(
        Case(Shape(B=max(1, 32768 // t), T=t, N=16, H=128), causal, "bfloat16")
        for t in (4096, 8192, 16384, 32768, 65536)
    ),
    *(Case(Shape(B=32768 // t, T=t, N=16, H=128), hash16, "bfloat16") for t in (16384, 32768)),
    Case(Shape(B=1, T=16384, N=16, K=4, H=128), hash16, "bfloat16"),
)
