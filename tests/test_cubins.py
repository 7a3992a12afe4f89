"""Kernels compiled to machine code without a GPU, where the compiler is installed (see `cubins.py`)."""

import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NVCC = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13" / "bin"
INSTALLED = NVCC.exists() and importlib.util.find_spec("jax_cuda13_plugin") is not None
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu,cuda",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # there is no GPU to check
    "MOSAIC_GPU_DUMP_PTXAS": "1",
    "PYTHONPATH": str(ROOT),
    "PATH": f"{NVCC}{os.pathsep}{os.environ['PATH']}",
}


@pytest.mark.skipif(not INSTALLED, reason="needs jax-cuda13-plugin, jax-cuda13-pjrt and nvidia-cuda-nvcc")
@pytest.mark.parametrize("implementation", ["triton", "mosaic"])
def test_shipped_kernels_compile(implementation):
    command = [sys.executable, str(ROOT / "tests" / "cubins.py"), implementation]
    inherited = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, env=inherited | ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(records) > 20
    assert not [record for record in records if record["error"]]
    assert not [record for record in records if record["serialised"]]
    if implementation == "mosaic":
        spilled = {record["pass"]: record["spilled_bytes"] for record in records if record["spilled_bytes"]}
        # One or two registers; those of dk and dv by position are put down once a tile and not in its loop.
        spilling = ("backward_dkv_by_position", "backward_dq_with_slopes")
        spilling += ("backward_dq_of_a_round", "backward_dkv_of_a_round")
        assert all(name in spilling and size <= 8 for name, size in spilled.items()), spilled
