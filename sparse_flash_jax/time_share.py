"""What share of dense attention's time to expect of sparse attention, out of measurements that ship with the package.

`benchmarks/density.py` measures, and with `--package` writes `time_shares.json`, which is read here. What follows from
a share is left to others: `stats.py` prints it, `flax/auto.py` chooses by it.
"""

import functools
import json
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from sparse_flash_jax.kernels.implementations import default_device_kind, has_gpu_kernels
from sparse_flash_jax.validation import positive_int

Method = Literal["hash", "qk"]

_MEASURED = Path(__file__).with_name("time_shares.json")
_NVIDIA = "NVIDIA "


class TimeShare(NamedTuple):
    """Expected time of forward and backward, whole calls with their plans, over that of dense causal attention.

    Dense attention is `jax.nn.dot_product_attention(is_causal=True)`: cuDNN's on a GPU, XLA's on a CPU.
    """

    share: float
    """Of sparse attention; below 1 it is faster than dense attention."""
    own_dense: float
    """Of this package's own dense causal attention, `causal(T)`, at the same length."""
    device_kind: str
    """Device that this is expected of."""
    measured_on: str
    """Device that was measured; all CPUs are "cpu" and assumed to be alike."""

    @property
    def source(self) -> str:
        """Where the figures come from, in words."""
        if self.device_kind == self.measured_on:
            return f"measured on {self.measured_on}"
        return f"measured on {self.measured_on}, and {self.device_kind} assumed to be alike"

    def __str__(self) -> str:
        return f"{self.share:.2f} of dense attention's, forward + backward ({self.source})"


def expected_time_share(
    length: int, density: float, *, method: Method = "hash", device_kind: str | None = None
) -> TimeShare | None:
    """Returns the share of dense attention's time to expect of sparse self-attention, before anything runs.

    Linear in the logarithms of length, density and share between measurements, and outside of them that of the nearest
    length and density. A GPU was measured with 32k tokens in a batch (64k at that length), 12 heads of 64 and bfloat16,
    a CPU with one sequence, 4 heads of 64 and float32. Keep masks, or bucket ids and how many there are, were given:
    hashing or scoring comes on top. Forward alone pays later than forward and backward.

    Args:
        length: tokens of a sequence, T.
        density: visible pairs over those of dense causal attention: 1 / num_buckets for evenly filled buckets,
            (1 - rate)**2 for dropped queries and keys. `plan.density()` is that of a plan.
        method: "hash" for tokens in groups, "qk" for dropped ones.
        device_kind: `device_kind` of a JAX device; None for the default device.

    Returns:
        The expectation. An NVIDIA GPU that was not measured is assumed to be as the one that shares most words of
        its name, and says so; None where the default device is one that this package has no kernels for. All CPUs are
        "cpu", assumed to be as the one that was measured. None for any other device that was not measured.

    Raises:
        TypeError: if the length is not an int.
        ValueError: if the length or density is not positive, or the method unknown.
    """
    positive_int("length", length)
    if not 0 < density < math.inf:
        raise ValueError(f"density must be positive, the share of causal pairs that are visible, got {density}.")
    if method not in ("hash", "qk"):
        raise ValueError(f"method must be 'hash' or 'qk', got {method!r}.")
    if device_kind is None:
        device_kind = default_device_kind()
        if device_kind.startswith(_NVIDIA) and not has_gpu_kernels():
            return None
    measured_on = _nearest(device_kind)
    if measured_on is None:
        return None
    rows = _measured()[measured_on]["lengths"]
    lengths = [row["length"] for row in rows]
    shares = [_interpolate(float(density), *zip(*row[method], strict=True)) for row in rows]
    own_dense = [row["own_dense"] for row in rows]
    share, own_dense = (_interpolate(float(length), lengths, values) for values in (shares, own_dense))
    return TimeShare(share, own_dense, device_kind, measured_on)


def _nearest(device_kind: str) -> str | None:
    """The measured device that stands for this one."""
    kinds = list(_measured())
    if device_kind in kinds:
        return device_kind
    if not device_kind.startswith(_NVIDIA):
        return None
    nvidia = [kind for kind in kinds if kind.startswith(_NVIDIA)]
    words = set(device_kind.split())
    return max(nvidia, key=lambda kind: len(words & set(kind.split())), default=None)


def _interpolate(x: float, xs: Any, ys: Any) -> float:
    """Linear in the logarithms of both; the nearest end outside."""
    return float(np.exp(np.interp(np.log(x), np.log(xs), np.log(ys))))


@functools.cache
def _measured() -> dict[str, Any]:
    """Measurements by device kind: an `environment`, and rows of `lengths` with [density, share] pairs, both rising."""
    return json.loads(_MEASURED.read_text("utf-8"))
