"""Angular locality-sensitive hashing: vectors that point the same way tend to share a bucket."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32, PRNGKeyArray

from sparse_flash_jax.kernels.implementations import by_platform, hashing_kernel
from sparse_flash_jax.partitioning import by_batch_and_head
from sparse_flash_jax.validation import FLOAT_DTYPES, check_array, check_implementation_name, positive_int


def lsh_buckets(
    x: Float[Array, "B T N H"],
    num_buckets: int,
    key: PRNGKeyArray,
    *,
    num_rotations: int | None = None,
    centred: bool = False,
    implementation: str | None = None,
) -> Int32[Array, "B T N"]:
    """Returns the bucket of each vector: `argmax([x R, -x R])`, with R random, one for each head.

    R has num_buckets / 2 columns drawn from N(0, 1) and normalised. Give queries and keys the same key. There is no
    gradient through the hash, and unless `centred` the length of a vector does not matter. NVIDIA GPUs hash into up to
    256 buckets by a kernel of their own: in one pass, and with the same buckets but for ties within float32's rounding.

    Args:
        x: float [B T N H].
        num_buckets: even, at least 2.
        key: PRNG key from which R is drawn.
        num_rotations: how many heads R is drawn for; consecutive heads of x share one. For grouped-query attention give
            the number of key heads for the queries. None for N.
        centred: whether to hash each vector minus the running mean of those up to it, itself included. Vectors that
            have much in common else share a few large buckets, and their size is what attention costs; the softmax
            itself does not see what all keys have in common. Later vectors do not matter, so that causal attention
            stays causal. The first vector is its own mean, and goes to bucket 0.
        implementation: "xla" hashes by XLA alone; None, or another that `sparse_attention` has: by a kernel if it can.

    Returns:
        int32 [B T N] in [0, num_buckets).

    Raises:
        TypeError: if x is not float32, float16 or bfloat16.
        ValueError: if num_buckets is odd or below 2, num_rotations does not divide N, or the implementation is unknown.

    Source: "Practical and Optimal LSH for Angular Distance", arXiv 1509.02897.
    """
    rotation = draw_rotation(x, num_buckets, key, num_rotations)
    return buckets_of(x, rotation, centred=centred, implementation=implementation)


def buckets_of(
    x: Float[Array, "B T N H"],
    rotation: Float32[Array, "K H R"],
    *,
    centred: bool = False,
    implementation: str | None = None,
) -> Int32[Array, "B T N"]:
    """`lsh_buckets` by rotations that are drawn already, two buckets for each of their columns."""
    check_implementation_name(implementation)
    hash_rows = None if implementation == "xla" else hashing_kernel(2 * rotation.shape[-1])
    return _buckets(lax.stop_gradient(x), rotation, hash_rows=hash_rows, centred=centred)


def hash_sides(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    num_buckets: int,
    key: PRNGKeyArray,
    *,
    centred: bool,
    implementation: str | None = None,
) -> tuple[Int32[Array, "B T N"], Int32[Array, "B S K"]]:
    """Returns the buckets of queries and keys by the same rotations; the same array twice where k is q."""
    hashed = functools.partial(
        lsh_buckets, num_buckets=num_buckets, key=key, centred=centred, implementation=implementation
    )
    query_bucket = hashed(q, num_rotations=k.shape[2])
    return query_bucket, query_bucket if k is q else hashed(k)


def draw_rotation(
    x: Float[Array, "B T N H"], num_buckets: int, key: PRNGKeyArray, num_rotations: int | None
) -> Float32[Array, "K H R"]:
    """Checks the arguments of `lsh_buckets` and returns its R: random columns of length 1 for each rotation."""
    check_array("x", x, "B T N H", FLOAT_DTYPES)
    positive_int("num_buckets", num_buckets)
    if num_buckets % 2:
        raise ValueError(f"num_buckets must be even (a direction and its opposite are two), got {num_buckets}.")
    _, _, heads, head_dim = x.shape
    num_rotations = heads if num_rotations is None else num_rotations
    positive_int("num_rotations", num_rotations)
    if heads % num_rotations:
        raise ValueError(f"num_rotations must divide the number of heads {heads}, got {num_rotations}.")
    rotation = jax.random.normal(key, (num_rotations, head_dim, num_buckets // 2), jnp.float32)
    return rotation / jnp.linalg.norm(rotation, axis=1, keepdims=True)


@functools.partial(jax.jit, static_argnames=("hash_rows", "centred"))
def _buckets(x, rotation, *, hash_rows, centred) -> Int32[Array, "B T N"]:
    make = by_xla = functools.partial(_hash, centred=centred)
    if hash_rows is not None:
        make = functools.partial(by_platform, functools.partial(hash_rows, centred=centred), by_xla)
    position = "-" if centred else "t"  # a running mean is of all positions before
    return by_batch_and_head(make, (x, rotation), (f"b{position}n-", "k--"), f"b{position}n")


def _hash(x: Float[Array, "B T N H"], rotation: Float32[Array, "K H R"], *, centred: bool) -> Int32[Array, "B T N"]:
    batch, length, heads, head_dim = x.shape
    num_rotations, _, directions = rotation.shape
    grouped = x.reshape(batch, length, num_rotations, heads // num_rotations, head_dim)
    projected = jnp.einsum(
        "btkgh,khr->btkgr", grouped.astype(jnp.float32), rotation, precision=lax.Precision.HIGHEST
    ).reshape(batch, length, heads, directions)
    if centred:  # the mean's projection is the projections' mean
        count = jnp.arange(1, length + 1, dtype=jnp.float32)[None, :, None, None]
        projected -= jnp.cumsum(projected, axis=1) / count
    bucket = jnp.argmax(jnp.concatenate([projected, -projected], axis=-1), axis=-1).astype(jnp.int32)
    return lax.stop_gradient(bucket)
