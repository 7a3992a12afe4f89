"""A case of `sweeps.py`, compiled without its arrays and then timed: forward, backward, and both.

Forward is the whole call by position; of ours that is plan, rows into slot order, kernels and back. Backward alone is
given what forward kept for it: of ours the plan is among that, and is not made again. Both is one program.
"""

import gc
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from passes import dense_attention, memory_bytes, whole, with_gradients
from sweep_cases import SweepCase
from timing import measure

SECONDS = 0.6  # that the samples of one part may take: of calls over a tenth of a second there are fewer

Arrays = dict[str, Any]


class Programs(NamedTuple):
    """A case's compiled programs, and what decides its mask, still in the host's memory."""

    arrays: Arrays
    draw: jax.stages.Compiled
    """A key -> q, k, v, do."""
    decide: jax.stages.Compiled | None
    """The arrays -> what decides the mask, where that is the mask itself."""
    forward: jax.stages.Compiled
    residuals: jax.stages.Compiled
    """Forward that also returns its backward pass, with all that this needs."""
    backward: jax.stages.Compiled
    forward_backward: jax.stages.Compiled


def compiled(case: SweepCase, implementation: str | None, dense: Literal["xla", "cudnn"]) -> Programs:
    """Compiles all programs of a case; none of its arrays is put on the device.

    Args:
        case: of any method but "flex".
        implementation: of ours.
        dense: of `jax.nn.dot_product_attention`, as the baseline.
    """
    shape, attend = case.case.shape, _attention(case, implementation, dense)
    arrays = case.case.arrays()
    key = jax.eval_shape(lambda: jax.random.key(0))
    decide = None
    deciding = _abstract(arrays) or None
    if case.method.startswith("naive"):
        decide = jax.jit(visible).lower(deciding).compile()
        deciding = _abstract(decide.out_info)
    elif case.method == "dense":
        arrays, deciding = {}, None
    draw = jax.jit(lambda key: _draw(key, (*shape.query_axes, shape.H), case.dtype)).lower(key).compile()
    q, k, v, do = _abstract(draw.out_info)

    def forward_residuals(deciding, q, k, v):
        return jax.vjp(lambda q, k, v: attend(deciding, q, k, v), q, k, v)

    residuals = jax.jit(forward_residuals).lower(deciding, q, k, v)
    _, pull_back = _abstract(residuals.out_info)
    backward = jax.jit(lambda pull_back, do: pull_back(do))
    return Programs(
        arrays,
        draw,
        decide,
        jax.jit(attend).lower(deciding, q, k, v).compile(),
        residuals.compile(),
        backward.lower(pull_back, do).compile(),
        with_gradients(attend).lower(deciding, q, k, v, do).compile(),
    )


def timed(programs: Programs, samples: int) -> dict[str, Any]:
    """Returns a record's `seconds` and `failed` of each part, and `memory_bytes`; all arrays are free afterwards."""
    record: dict[str, Any] = {"seconds": {}, "failed": {}, "memory_bytes": {}}
    programs_of = {"forward": programs.forward, "forward_backward": programs.forward_backward}
    record["memory_bytes"] = {name: memory_bytes(program) for name, program in programs_of.items()}

    def attempt(part: str, call: Callable[[], tuple]) -> None:
        try:
            function, *args = call()
            timing = measure(function, *args, samples=samples, seconds=SECONDS)
            record["seconds"][part] = timing._asdict()
        except jax.errors.JaxRuntimeError as error:  # out of memory: other parts and cases are to go on
            record["failed"][part] = why(error)

    def backward(deciding, q, k, v, do):
        _, pull_back = programs.residuals(deciding, q, k, v)
        return programs.backward, pull_back, do

    try:
        q, k, v, do = programs.draw(jax.random.key(0))
        deciding = jax.tree.map(jnp.asarray, programs.arrays) or None
        if programs.decide is not None:
            deciding = programs.decide(deciding)
    except jax.errors.JaxRuntimeError as error:
        record["failed"]["inputs"] = why(error)
        return record
    attempt("forward", lambda: (programs.forward, deciding, q, k, v))
    attempt("backward", lambda: backward(deciding, q, k, v, do))
    attempt("forward_backward", lambda: (programs.forward_backward, deciding, q, k, v, do))
    del q, k, v, do, deciding
    gc.collect()
    return record


def why(error: BaseException) -> str:
    """Returns an error's kind and first line."""
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"


def visible(arrays: Arrays) -> jax.Array:
    """Returns bool [B N T T] of bucket ids, or of keep masks, [B T N]: what the causal pattern shows, by definition."""
    names = ("query_group", "key_group") if "query_group" in arrays else ("query_keep", "key_keep")
    query, key = (jnp.swapaxes(arrays[name], 1, 2) for name in names)
    query, key = query[..., :, None], key[..., None, :]
    seen = query == key if "query_group" in arrays else query & key
    length = query.shape[2]
    position = jnp.arange(length, dtype=jnp.int32)
    return seen & (position[:, None] >= position[None, :])[None, None]


def _attention(case: SweepCase, implementation: str | None, dense: Literal["xla", "cudnn"]) -> Callable[..., jax.Array]:
    """Returns attention of (what decides the mask, q, k, v)."""
    if case.method == "sparse":
        return whole(case.case, implementation)
    if case.method == "dense":
        return dense_attention(dense)
    masked: Literal["xla", "cudnn"] = "cudnn" if case.method == "naive_cudnn" else "xla"

    def attend(mask, q, k, v):
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=masked)

    return attend


def _draw(key: jax.Array, size: tuple[int, ...], dtype: str) -> tuple[jax.Array, ...]:
    """Standard normal q, k, v and cotangent."""
    return tuple(jax.random.normal(each, size, jnp.dtype(dtype)) for each in jax.random.split(key, 4))


def _abstract(tree: Any) -> Any:
    """Returns shapes and dtypes in place of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
