"""Interval attention through Pallas Mosaic GPU: Hopper GPUs (compute capability 9.0), 16-bit dtypes."""

from sparse_flash_jax.kernels.mosaic.dkv import backward as backward
from sparse_flash_jax.kernels.mosaic.dkv import backward_dkv as backward_dkv
from sparse_flash_jax.kernels.mosaic.dq import backward_dq as backward_dq
from sparse_flash_jax.kernels.mosaic.forward import forward as forward
from sparse_flash_jax.kernels.mosaic.launch import reads_in_place as reads_in_place
