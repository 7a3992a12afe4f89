"""Interval attention through Pallas-Triton: NVIDIA GPUs of compute capability 8.0 and up, any supported dtype."""

from sparse_flash_jax.kernels.triton.backward import backward_dkv as backward_dkv
from sparse_flash_jax.kernels.triton.backward import backward_dq as backward_dq
from sparse_flash_jax.kernels.triton.forward import forward as forward
