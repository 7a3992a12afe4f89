"""Sparse attention, as a user calls it: validate, then `permuted_attention`; each method of the paper in one call."""

from typing import Any, Literal, overload

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32, PRNGKeyArray

from sparse_flash_jax.kernels.alibi import Alibi, constant
from sparse_flash_jax.kernels.config import Config
from sparse_flash_jax.kernels.implementations import check_implementation
from sparse_flash_jax.kernels.interval import permuted_attention
from sparse_flash_jax.patterns import hash_sparse, qk_sparse
from sparse_flash_jax.permute import restore_lse
from sparse_flash_jax.plan import AttentionPlan
from sparse_flash_jax.rounds import Rounds, attend_in_rounds, hash_rounds, in_rounds
from sparse_flash_jax.validation import check_attention_inputs, check_logits, check_near, check_scale


@overload
def sparse_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    plan: AttentionPlan,
    *,
    scale: float | None = ...,
    soft_cap: float | None = ...,
    sink_logits: Float[Array, " N"] | None = ...,
    alibi_slopes: Float[Array, " N"] | None = ...,
    implementation: str | None = ...,
    config: Config | None = ...,
    return_residual: Literal[False] = ...,
) -> Float[Array, "B T N H"]: ...
@overload
def sparse_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    plan: AttentionPlan,
    *,
    scale: float | None = ...,
    soft_cap: float | None = ...,
    sink_logits: Float[Array, " N"] | None = ...,
    alibi_slopes: Float[Array, " N"] | None = ...,
    implementation: str | None = ...,
    config: Config | None = ...,
    return_residual: Literal[True],
) -> tuple[Float[Array, "B T N H"], Float32[Array, "B T N"]]: ...
def sparse_attention(
    q,
    k,
    v,
    plan,
    *,
    scale=None,
    soft_cap=None,
    sink_logits=None,
    alibi_slopes=None,
    implementation=None,
    config=None,
    return_residual=False,
):
    """Returns exact softmax attention over the pairs that the plan shows; what it hides costs no time.

        o[i] = sum_j softmax_j(scale * q[i] . k[j]) v[j]      over the keys j that query i sees

    Differentiable in q, k and v. Works under jit, grad, vmap, remat, scan, shard_map and pmap. As in any masked
    product, hidden and dropped rows must hold finite numbers: a NaN in one can reach the outputs, by 0 * NaN.

    Args:
        q: float32, float16 or bfloat16 [B T N H].
        k: [B S K H] in q's dtype; K divides N, and query head n reads key head n // (N / K).
        v: [B S K H] in q's dtype.
        plan: from `causal`, `packed`, `qk_sparse`, `hash_sparse` or `make_plan`, for these lengths and head counts.
        scale: static factor on the scores; None for 1 / sqrt(H).
        soft_cap: static bound of the scores, which become soft_cap * tanh(score / soft_cap); None for none.
        sink_logits: float [N], of each head the score of one more key, whose value is 0 and which all queries see that
            see another, so that a query may attend to nothing; differentiable. None for none.
        alibi_slopes: float [N], of each head what scores lose for each position between query i and key j, after the
            cap: slope * |i - j|, the plan's `query_offset` added to i (a union or an intersection has that of its first
            plan), in whatever order the plan sorts. Constants: to differentiate them raises NotImplementedError. None
            for none.
        implementation: "mosaic", "triton" or "xla"; None picks for the default device. A named one never falls back.
        config: tile sizes of the kernels (`kernels/config.py`), `HopperBlocks` for "mosaic", else `Blocks`;
            None for those that suit the shapes and the device.
        return_residual: whether to also return the log-sum-exp of each query's scores.

    Returns:
        [B T N H] in q's dtype, 0 where a query sees nothing (gradients too). With return_residual also lse, float32
        [B T N], natural log, the sink included, -inf where a query sees nothing; gradients flow through it.

    Raises:
        TypeError: if q, k, v are not of one supported dtype, or plan is not an AttentionPlan.
        ValueError: if shapes do not fit one another or the plan, or the implementation is unknown.
        NotImplementedError: if the named implementation cannot do this call, or slopes are differentiated.

    Sources: "Faster Causal Attention Over Large Sequences Through Sparse Flash Attention", arXiv 2306.01160; soft caps
        as in "Gemma 2", arXiv 2408.00118, sinks as in "gpt-oss-120b & gpt-oss-20b Model Card", arXiv 2508.10925, and
        slopes as in "Train Short, Test Long: Attention with Linear Biases", arXiv 2108.12409.
    """
    check_attention_inputs(q, k, v)
    check_scale(scale)
    check_logits(soft_cap, sink_logits, alibi_slopes, q)
    check_implementation(implementation, q.dtype, q.shape[-1], config)
    _check_plan(plan, q, k)

    out, lse = permuted_attention(
        q,
        k,
        v,
        plan.runs,
        plan.queries,
        plan.keys,
        scale=scale,
        soft_cap=soft_cap,
        implementation=implementation,
        config=config,
        long_runs=plan.long_runs,
        alibi=None if alibi_slopes is None else _alibi(alibi_slopes, plan),
    )
    if not return_residual and sink_logits is None:
        return out
    lse = restore_lse(lse, plan.queries)
    if sink_logits is not None:
        out, lse = _with_sink(out, lse, sink_logits)
    return (out, lse) if return_residual else out


def _alibi(slopes: Float[Array, " N"], plan: AttentionPlan) -> Alibi:
    """Slopes, and the position of the token in each slot."""

    def positions(order: Int32[Array, "B A C"] | None, length: int) -> Int32[Array, "_B _A _C"]:
        return jnp.arange(length, dtype=jnp.int32)[None, None] if order is None else order

    queries, keys = positions(plan.query_order, plan.query_length), positions(plan.key_order, plan.key_length)
    if plan.query_offset is not None:
        queries = queries + plan.query_offset[..., None]
    return Alibi(constant(slopes).astype(jnp.float32), queries.astype(jnp.float32), keys.astype(jnp.float32))


def _with_sink(
    o: Float[Array, "B T N H"], lse: Float32[Array, "B T N"], sink: Float[Array, " N"]
) -> tuple[Float[Array, "B T N H"], Float32[Array, "B T N"]]:
    """Outputs and log-sum-exp with one more score in each softmax, whose value is 0."""
    some = lse > -jnp.inf
    known = jnp.where(some, lse, 0.0)
    total = jnp.logaddexp(known, sink.astype(jnp.float32)[None, None])
    share = jnp.exp(known - total)[..., None]
    return (o.astype(jnp.float32) * share).astype(o.dtype), jnp.where(some, total, -jnp.inf)


def hash_sparse_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    num_buckets: int,
    key: PRNGKeyArray,
    *,
    causal: bool = True,
    exclude_self: bool = False,
    window: int | None = None,
    centred: bool = False,
    rounds: int = 1,
    near: int | None = None,
    scale: float | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Any:
    """Returns attention in which queries see the keys that hash to their own bucket: hash, plan, attend.

    One hash parts some that are alike. In several rounds each has a hash of its own, and a query sees the keys that are
    in its bucket in any of them, all in one softmax, each once. Each round attends, and keeps for the backward pass, as
    much as one hash alone, and compares its pairs with all earlier rounds.

    Args:
        q: float [B T N H].
        k: float [B S K H]; with shared queries and keys, q normalised per head.
        v: float [B S K H].
        num_buckets: even, at least 2; about T / num_buckets keys share a bucket.
        key: PRNG key of the hash. Draw a fresh one for each step and layer.
        causal: whether a query sees no later key.
        exclude_self: whether a query also does not see the key of its own position.
        window: positions that a query looks back, its own included; None for all.
        centred: whether to hash vectors minus their running mean, which evens buckets out: see `lsh_buckets`.
        rounds: hashes, at least 1, each with rotations drawn from a part of `key`.
        near: positions back, its own included, that a query sees whatever their buckets, each once and in the same
            softmax: a sliding window beside the buckets, at the cost of another round. For causal attention.
        scale: as in `sparse_attention`.
        implementation: as in `sparse_attention`.
        return_residual: as in `sparse_attention`.

    Returns:
        As `sparse_attention`.

    Raises:
        TypeError, ValueError, NotImplementedError: as `lsh_buckets`, `hash_sparse` and `sparse_attention`.
        ValueError: if near is not positive, is more than the window, or attention is not causal.

    Source: arXiv 2306.01160, section 3.2; rounds as in "Reformer: The Efficient Transformer", arXiv 2001.04451, which
        counts a pair in each round that shows it, and then divides.
    """
    check_attention_inputs(q, k, v)
    check_scale(scale)
    check_near(near, window, causal)
    buckets = hash_rounds(q, k, num_buckets, key, rounds, centred=centred, implementation=implementation)
    rule = {"causal": causal, "exclude_self": exclude_self, "window": window}
    plans = tuple(hash_sparse(*x, **rule, num_buckets=num_buckets, implementation=implementation) for x in buckets)
    plan = in_rounds(plans, buckets, near, exclude_self=exclude_self)
    if not isinstance(plan, Rounds):
        return sparse_attention(
            q, k, v, plan, scale=scale, implementation=implementation, return_residual=return_residual
        )
    out, lse = attend_in_rounds(q, k, v, plan, scale=scale, implementation=implementation)
    return (out, lse) if return_residual else out


def qk_sparse_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    query_keep: Bool[Array, "#B T #N"],
    key_keep: Bool[Array, "#B S #K"],
    *,
    causal: bool = True,
    window: int | None = None,
    query_capacity: int | None = None,
    key_capacity: int | None = None,
    scale: float | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Any:
    """Returns attention among the queries and keys that are kept: plan, attend.

    Args:
        q: float [B T N H].
        k: float [B S K H].
        v: float [B S K H].
        query_keep: bool [B T N]; a dropped query outputs 0.
        key_keep: bool [B S K]; a dropped key is seen by nobody.
        causal: whether a query sees no later key.
        window: positions that a query looks back, its own included; None for all.
        query_capacity: most queries that any head keeps; attention then runs at this length.
        key_capacity: most keys that any head keeps.
        scale: as in `sparse_attention`.
        implementation: as in `sparse_attention`.
        return_residual: as in `sparse_attention`.

    Returns:
        As `sparse_attention`.

    Raises:
        TypeError, ValueError, NotImplementedError: as `qk_sparse` and `sparse_attention`.

    Source: arXiv 2306.01160, section 3.1.
    """
    plan = qk_sparse(
        query_keep,
        key_keep,
        causal=causal,
        window=window,
        query_capacity=query_capacity,
        key_capacity=key_capacity,
        implementation=implementation,
    )
    return sparse_attention(q, k, v, plan, scale=scale, implementation=implementation, return_residual=return_residual)


def _check_plan(plan: AttentionPlan, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"]) -> None:
    if not isinstance(plan, AttentionPlan):
        raise TypeError(
            f"plan must be an AttentionPlan, from causal() or make_plan() for one, got {type(plan).__name__}."
        )
    for name, expected, got in (
        ("queries", q.shape[1], plan.query_length),
        ("keys", k.shape[1], plan.key_length),
    ):
        if expected != got:
            raise ValueError(
                f"the plan is for {got} {name}, got {expected}, the second axis of [B T N H]; "
                "make a plan for these lengths."
            )
    for name, expected, got in (
        ("query heads", q.shape[2], plan.query_heads),
        ("key heads", k.shape[2], plan.key_heads),
        ("batch entries", q.shape[0], plan.batch_size),
    ):
        if got not in (1, expected):
            raise ValueError(f"the plan is for {got} {name}, got {expected}; 1 or {expected} would fit.")
