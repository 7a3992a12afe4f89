"""The calls that are timed: the whole of sparse attention, its parts, and the dense baselines."""

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from selection import Case, Shape

import sparse_flash_jax as sfj
from sparse_flash_jax.kernels.implementations import default_config, pick_implementation
from sparse_flash_jax.kernels.interval import interval_attention
from sparse_flash_jax.kernels.rows import row_kernels, to_positions, to_slots


class Call(NamedTuple):
    """A jitted function and its arguments."""

    function: jax.stages.Wrapped
    args: tuple[Any, ...]

    def compile(self) -> jax.stages.Compiled:
        """Returns the compiled function, to be called or asked for its memory."""
        return self.function.lower(*self.args).compile()


def make_plan(case: Case, arrays: dict[str, jax.Array]) -> sfj.AttentionPlan:
    """Returns the case's plan, from its groups and keep masks."""
    pattern, shape = case.pattern, case.shape
    if arrays:
        return sfj.make_plan(**arrays, **pattern.options, num_buckets=pattern.num_buckets)
    return sfj.causal(shape.T, shape.keys, pattern.query_offset, window=pattern.window)


def sparse_step(case: Case, implementation: str | None) -> Call:
    """Returns forward and backward as a user has them: plan, gather, kernels and restore in one `jit`."""
    q, k, v, do = tensors(case.shape, case.dtype)
    return Call(with_gradients(whole(case, implementation)), (_arrays(case), q, k, v, do))


def sparse_calls(case: Case, implementation: str | None) -> dict[str, Call]:
    """Returns the whole call (`forward`, `forward_backward`), and plan, gather and kernels by themselves."""
    arrays, (q, k, v, do) = _arrays(case), tensors(case.shape, case.dtype)
    plan = jax.jit(lambda arrays: make_plan(case, arrays))
    planned = plan(arrays)
    kernels = row_kernels(implementation or pick_implementation(case.dtype, case.shape.H), interpret=False)
    permutations = planned.queries, planned.keys, planned.keys
    *slotted, slotted_do = to_slots((q, k, v, do), (*permutations, planned.queries), kernels)

    def kernel(runs, q, k, v):
        return interval_attention(q, k, v, runs, implementation=implementation, long_runs=planned.long_runs)[0]

    def permute(permutations, q, k, v, o):
        return to_slots((q, k, v), permutations, kernels), to_positions((o,), permutations[:1], kernels)

    return {
        "plan": Call(plan, (arrays,)),
        "gather": Call(jax.jit(permute), (permutations, q, k, v, slotted_do)),
        "kernel_forward": Call(jax.jit(kernel), (planned.runs, *slotted)),
        "kernel_forward_backward": Call(with_gradients(kernel), (planned.runs, *slotted, slotted_do)),
        **whole_calls(case, implementation),
        **_hashed_call(case, implementation),
    }


@functools.cache
def planned_step(plan_of: Callable[..., sfj.AttentionPlan], implementation: str | None) -> jax.stages.Wrapped:
    """Returns forward and backward as a jitted function of (deciding, q, k, v, do), over `plan_of(deciding, q, k)`.

    It is one function for one `plan_of`, and compiles once for a shape.
    """

    def attend(deciding, q, k, v):
        return sfj.sparse_attention(q, k, v, plan_of(deciding, q, k), implementation=implementation)

    return with_gradients(attend)


def whole_calls(case: Case, implementation: str | None) -> dict[str, Call]:
    """Returns the whole call alone: `forward`, `forward_backward`."""
    arrays, (q, k, v, do) = _arrays(case), tensors(case.shape, case.dtype)
    attend = whole(case, implementation)
    return {
        "forward": Call(jax.jit(attend), (arrays, q, k, v)),
        "forward_backward": Call(with_gradients(attend), (arrays, q, k, v, do)),
    }


def _hashed_call(case: Case, implementation: str | None) -> dict[str, Call]:
    """Returns `hashed_forward_backward` of even buckets: into as many, the call hashes q and k itself."""
    num_buckets = case.pattern.num_buckets
    if num_buckets is None or case.pattern.name != f"hash{num_buckets}":
        return {}
    q, k, v, do = tensors(case.shape, case.dtype)

    def attend(key, q, k, v):
        return sfj.hash_sparse_attention(q, k, v, num_buckets, key, implementation=implementation)

    return {"hashed_forward_backward": Call(with_gradients(attend), (jax.random.key(0), q, k, v, do))}


def dense_calls(case: Case, implementation: Literal["xla", "cudnn"]) -> dict[str, Call]:
    """Returns dense causal attention of JAX's own on the same tensors."""

    return _baseline("dense", dense_attention(implementation), case)


def dense_attention(implementation: Literal["xla", "cudnn"]) -> Callable[..., jax.Array]:
    """Returns dense causal attention of (None, q, k, v)."""

    def dense(_, q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)

    return dense


def mha_calls(case: Case, backward_side: int) -> dict[str, Call]:
    """Returns dense causal attention by `mha_attention` on the same tensors."""
    attention = mha_attention(backward_side)
    return _baseline("mha", lambda _, q, k, v: attention(q, k, v), case)


def mha_attention(backward_side: int) -> Callable[..., jax.Array]:
    """Returns dense causal attention of q, k, v by JAX's own Pallas-Triton kernels, forward with its default tiles.

    Raises:
        ImportError: if this JAX has them no more.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu.attention import BlockSizes, mha

    sides = dict.fromkeys(("block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), backward_side)
    blocks = BlockSizes(block_q=128, block_k=128, **sides)  # forward: its default

    def dense(q, k, v):
        return mha(q, k, v, None, 1 / math.sqrt(q.shape[-1]), True, blocks)

    return dense


def _baseline(name: str, dense: Callable[..., jax.Array], case: Case) -> dict[str, Call]:
    q, k, v, do = tensors(case.shape, case.dtype)
    return {
        f"{name}_forward": Call(jax.jit(dense), (None, q, k, v)),
        f"{name}_forward_backward": Call(with_gradients(dense), (None, q, k, v, do)),
    }


def matmul_call(dtype: str, size: int) -> Call:
    """Returns a square matrix product, for the rate that the device reaches."""
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.float32).astype(dtype)
    return Call(jax.jit(jnp.matmul), (x, x))


def _arrays(case: Case) -> dict[str, jax.Array]:
    return {name: jnp.asarray(x) for name, x in case.arrays().items()}


@functools.lru_cache(maxsize=1)
def tensors(shape: Shape, dtype: str) -> list[jax.Array]:
    """Standard normal q, k, v and cotangent. Drawn on the device: a case's own take seconds at benchmark size."""
    sizes = ((*axes, shape.H) for axes in (shape.query_axes, shape.key_axes, shape.key_axes, shape.query_axes))
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, size, jnp.dtype(dtype)) for key, size in zip(keys, sizes, strict=True)]


def whole(case: Case, implementation: str | None) -> Callable[..., jax.Array]:
    """Returns sparse attention of (arrays, q, k, v), the plan made of the case's arrays inside."""

    def attend(arrays, q, k, v):
        return sfj.sparse_attention(q, k, v, make_plan(case, arrays), implementation=implementation)

    return attend


def with_gradients(attend: Callable[..., jax.Array]) -> jax.stages.Wrapped:
    """Returns a jitted function of (what decides the mask, q, k, v, do) that gives o, dq, dk, dv."""

    def step(deciding, q, k, v, do):
        o, pull_back = jax.vjp(lambda q, k, v: attend(deciding, q, k, v), q, k, v)
        return o, *pull_back(do)

    return jax.jit(step)


def forward_tiles(plan: sfj.AttentionPlan, dtype: str, head_dim: int, implementation: str | None) -> sfj.PlanStats:
    """Counts the tiles of the forward pass, of the size that it has by default."""
    runs = plan.runs
    implementation = implementation or pick_implementation(dtype, head_dim, runs=runs)
    config = default_config(implementation, dtype=dtype, head_dim=head_dim, runs=runs, long_runs=plan.long_runs)
    return plan.stats(config.forward.rows, config.forward.columns)


def memory_bytes(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Returns bytes by the compiler's plan: `held` (arguments and outputs), `temporary`, and `peak`, all together."""
    plan = planned_memory(compiled)
    held = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return {"held": held, "temporary": plan.temp_size_in_bytes, "peak": held + plan.temp_size_in_bytes}


def planned_memory(compiled: jax.stages.Compiled) -> Any:
    """Returns the compiler's plan of temporary, argument and output bytes.

    Raises:
        NotImplementedError: if the backend does not tell.
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise NotImplementedError("this backend does not tell how much memory a program takes.")
    return analysis
