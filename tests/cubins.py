"""Compiles every kernel that is shipped to machine code for GPUs that are not there, and says what ptxas says.

Run by `test_cubins.py`, which says what must be installed and set; prints a line of JSON for each kernel.
"""

import functools
import itertools
import json
import os
import re
import sys
import tempfile

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from sparse_flash_jax.kernels import mosaic, triton
from sparse_flash_jax.kernels.config import mosaic_config, triton_config
from sparse_flash_jax.kernels.tiles import Runs
from tests.gpus import GPUS, on, passes, passes_by_position, passes_of_a_round, passes_with_slopes

HOPPER = "NVIDIA H100 80GB HBM3"
# What the compiler asks of a GPU: capability, shared memory a block and a multiprocessor, L2, memory, its bandwidth.
TARGETS = {
    "NVIDIA A100-SXM4-40GB": ("major: 8 minor: 0", 166_912, 167_936, 41_943_040, 42_297_786_368, 1_555_200_000_000),
    "NVIDIA GeForce RTX 4090": ("major: 8 minor: 9", 101_376, 102_400, 75_497_472, 25_393_692_672, 1_008_096_000_000),
    HOPPER: (
        "major: 9 feature_extension: ACCELERATED_FEATURES",
        232_448,
        233_472,
        52_428_800,
        84_942_979_072,
        3_352_320_000_000,
    ),
}


def target(kind: str) -> str:
    """The compiler's description of a GPU, as a text proto."""
    capability, shared, shared_core, cache, memory, bandwidth = TARGETS[kind]
    return f"""
gpu_device_info {{
  name: "{kind}" device_vendor: "NVIDIA Corporation" core_count: {GPUS[kind][0]} clock_rate_ghz: 1.7
  cuda_compute_capability {{ {capability} }} device_address_bits: 64 threads_per_warp: 32
  threads_per_block_limit: 1024 threads_per_core_limit: 2048 fpus_per_core: 128
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {shared} shared_memory_per_core: {shared_core}
  l2_cache_size: {cache} device_memory_size: {memory} memory_bandwidth: {bandwidth}
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{kind}"
"""


def compile_all(kernels, kind, dtype, head_dim, config, *, rounds):
    """Yields each pass's name, and the error or None; with `rounds`, those of later rounds, too."""
    topology = topologies.get_topology_desc("", platform="cuda", target_config=target(kind), topology="1x1x1")
    place = SingleDeviceSharding(topology.devices[0])
    runs = Runs(*jax.eval_shape(lambda: [jnp.zeros((1, 4, 1024), jnp.int32)] * 4))
    by_position = kernels is mosaic and not config.fused
    compiled = {
        "": passes(kernels, dtype, head_dim, runs, length=1024, fused=config.fused),
        "_by_position": passes_by_position(kernels, dtype, head_dim, runs, length=1024) if by_position else (),
        "_with_slopes": passes_with_slopes(kernels, dtype, head_dim, runs, length=1024),
        "_of_a_round": passes_of_a_round(kernels, dtype, head_dim, runs, length=1024) if rounds else (),
    }
    for how, (kernel, operands) in ((how, each) for how, of_passes in compiled.items() for each in of_passes):
        name = kernel.__name__ + how
        placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), operands)
        function = jax.jit(functools.partial(kernel, scale=0.1, config=config))
        try:
            with on(kind):
                lowered = function.trace(*placed).lower(lowering_platforms=("cuda",))
            lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            yield name, str(error).splitlines()[0]
        else:
            yield name, None


def said(action):
    """Runs an action and returns what it gives, and what is printed meanwhile, by C++ too."""
    sys.stdout.flush()
    with tempfile.TemporaryFile("w+b") as file:
        before = [os.dup(stream) for stream in (1, 2)]
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        try:
            result = action()
        finally:
            for stream, copy in zip((1, 2), before, strict=True):
                os.dup2(copy, stream)
                os.close(copy)
        file.seek(0)
        return result, file.read().decode(errors="replace")


def main() -> None:
    """Compiles and prints."""
    shipped = [
        (triton, kind, dtype, head_dim, long_runs, triton_config(dtype, head_dim, long_runs=long_runs, capability=c))
        for (kind, (_, c)), dtype, head_dim, long_runs in itertools.product(
            GPUS.items(), ("bfloat16", "float32"), (64, 80, 128, 192, 256), (False, True)
        )
    ]
    shipped += [
        (mosaic, HOPPER, dtype, head_dim, long_runs, mosaic_config(head_dim, long_runs=long_runs))
        for dtype, head_dim, long_runs in itertools.product(
            ("bfloat16", "float16"), (64, 96, 128, 192, 256), (False, True)
        )
    ]
    wanted = sys.argv[1:]
    for kernels, kind, dtype, head_dim, long_runs, config in shipped:
        name = kernels.__name__.rpartition(".")[2]
        if wanted and name not in wanted:
            continue
        # Runs within buckets do not count as long.
        results = compile_all(kernels, kind, dtype, head_dim, config, rounds=not long_runs)
        while True:
            result, text = said(lambda results=results: next(results, None))
            if result is None:
                break
            record = {"implementation": name, "gpu": kind, "dtype": dtype, "head_dim": head_dim}
            record |= {"long_runs": long_runs, "pass": result[0], "error": result[1]}
            spilled = [int(size) for size in re.findall(r"(\d+) bytes spill stores", text)]
            record |= {"spilled_bytes": max(spilled, default=0), "serialised": "erializ" in text or "C7510" in text}
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
