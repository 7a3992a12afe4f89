"""Models that use the attention of `sparse_flash_jax`."""
