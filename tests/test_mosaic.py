"""The Hopper kernels, without a GPU: in Pallas' interpreter, which looks for races, and lowered for CUDA."""

from sparse_flash_jax.kernels.config import Config, HopperBlocks
from tests.contract import IntervalContract

CONFIGS = {
    "small": Config(HopperBlocks(1, 64, 2), HopperBlocks(1, 64, 2), HopperBlocks(1, 64, 2), interpret=True),
    "each_pass_its_own": Config(
        HopperBlocks(2, 64, 2, overlap=True),
        HopperBlocks(2, 64, 3, overlap=True),
        HopperBlocks(1, 64, 2, rows_in_registers=True, tiles=2),
        interpret=True,
    ),
    "past_the_end": Config(
        HopperBlocks(1, 128, 2, tiles=2), HopperBlocks(1, 128, 1, tiles=4), HopperBlocks(2, 64, 3), interpret=True
    ),
}


class TestInterpreted(IntervalContract):
    implementation = "mosaic"
    configs = CONFIGS
    dtypes = ("bfloat16", "float16")
