"""Importing the package costs little, brings in nothing that it should not, and asks for no device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MEASURE = """
import json, sys, time
import jax
begin = time.process_time()
import sparse_flash_jax
print(json.dumps({"seconds": time.process_time() - begin, "modules": sorted(sys.modules)}))
"""
FOREIGN = ("flax", "optax", "orbax", "torch", "triton", "jax_triton", "tokamax", "beartype", "matplotlib", "rich")
GPU = ("jax.experimental.pallas", "jax._src.pallas", "jax.experimental.mosaic", "jaxlib.triton", "jax_cuda")
# Of the processor's time, which others who use it lengthen less: 0.06 s alone, up to 0.2 on two busy cores.
ALLOWED_SECONDS = 0.3


def fresh(code, **environment):
    """Runs code in a fresh interpreter and returns what it prints."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def measured():
    return [json.loads(fresh(MEASURE)) for _ in range(3)]


def test_import_costs_little(measured):
    assert min(run["seconds"] for run in measured) <= ALLOWED_SECONDS


def test_import_brings_in_nothing_foreign(measured):
    before = set(json.loads(fresh("import json, sys, jax; print(json.dumps(sorted(sys.modules)))")))
    found = set(measured[0]["modules"]) - before
    assert not [name for name in found if name.split(".")[0] in FOREIGN]
    assert not [name for name in found if name.startswith(GPU)]


def test_import_asks_for_no_device():
    fresh("import sparse_flash_jax", JAX_PLATFORMS="no_such_platform")


def test_public_names_are_imported():
    code = "import sparse_flash_jax as sfj; print(*(n for n in dir(sfj) if not n.startswith('_')))"
    names = set(fresh(code).split())
    documented = (
        "causal packed qk_sparse hash_sparse make_plan random_keep top_keep lsh_buckets sparse_attention "
        "hash_sparse_attention qk_sparse_attention reference_attention AttentionPlan PlanStats RESIDUAL_NAMES "
        "PLAN_NAME ROWS_NAME expected_time_share TimeShare context_attention Context Tokens to_zigzag from_zigzag "
        "zigzag_positions"
    )
    assert names >= set(documented.split())
