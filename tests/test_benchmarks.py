import json
import math
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CASE = "B1-T8192-N4-H64-hash16-f32"


def _run(script, *args, devices=1):
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, args)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def _finite(value):
    if isinstance(value, dict | list):
        return all(map(_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def _check_environment(environment):
    assert environment["platform"] == "cpu"
    assert environment["command"].startswith("python benchmarks/")
    assert {"device", "processor", "cores", "jax", "jaxlib", "python", "commit", "date"} <= environment.keys()


def test_attention_writes_times_work_and_memory(tmp_path):
    out = tmp_path / "attention.json"
    done = _run("attention.py", "--quick", "--cases", CASE, "--out", out)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    _check_environment(result["environment"])
    assert _finite(result)
    assert result["matmul_tflops"]["float32"] > 0

    (case,) = result["cases"]
    assert case["case"] == CASE.replace("8192", "256")
    assert case["dense"] == "measured"
    parts = {"plan", "gather", "kernel_forward", "kernel_forward_backward"}
    whole = {"forward", "forward_backward", "hashed_forward_backward", "dense_forward", "dense_forward_backward"}
    assert case["seconds"].keys() == parts | whole
    assert all(timing["best"] <= timing["median"] <= timing["worst"] for timing in case["seconds"].values())
    for name, speedup in case["speedup"].items():
        assert speedup == case["seconds"][f"dense_{name}"]["median"] / case["seconds"][name]["median"]
    assert 0 < case["tiles"]["executed"] <= case["tiles"]["total"]
    sparse, dense = (case["memory_bytes"][name] for name in ("forward_backward", "dense_forward_backward"))
    assert sparse["peak"] == sparse["held"] + sparse["temporary"] < dense["peak"]

    (memory,) = result["memory"]
    assert memory["length"] == 256
    assert memory["peak_rss_growth_bytes"] > 0
    assert memory["output_bytes"] > 4 * 256 * 4 * 64 * 4  # o, dq, dk, dv
    assert case["case"] in done.stdout
    assert "peak RSS growth" in done.stdout


def test_an_unknown_case_is_named():
    done = _run("attention.py", "--cases", "nonsense")
    assert done.returncode != 0
    assert "no case is named 'nonsense'" in done.stderr
    assert CASE in done.stderr


def test_overheads_writes_import_and_plan_times(tmp_path):
    out = tmp_path / "overheads.json"
    done = _run("overheads.py", "--quick", "--patterns", "causal", "hash16", "--out", out)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    _check_environment(result["environment"])
    assert _finite(result)
    assert result["import_seconds"]["sparse_flash_jax"] > 0
    assert [plan["pattern"] for plan in result["plans"]] == ["causal", "hash16"]
    assert all(plan[name]["median"] > 0 for plan in result["plans"] for name in ("eager", "jit"))


def test_density_writes_a_row_a_pattern(tmp_path):
    out = tmp_path / "density.json"
    patterns = "causal", "hash1", "hash16", "hash64", "qk0", "qk50", "qk80"
    done = _run("density.py", "--quick", "--patterns", *patterns, "--out", out)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    _check_environment(result["environment"])
    assert _finite(result)
    densities = {case["case"].split("-")[-2]: case["density"] for case in result["cases"]}
    assert tuple(densities) == patterns
    assert densities["hash1"] == densities["qk0"] == 1
    assert 0 < densities["qk80"] < densities["qk50"] < 0.5
    assert 0 < densities["hash64"] < densities["hash16"] < 0.1
    for case in result["cases"]:
        assert case["memory_bytes"].keys() == case["seconds"].keys()
        sparse, dense = (case["memory_bytes"][name]["peak"] for name in ("forward_backward", "dense_forward_backward"))
        assert 0 < sparse < dense


def test_the_package_ships_what_was_measured(tmp_path):
    out = tmp_path / "time_shares.json"
    done = _run("density.py", "--package", "--out", out)
    assert done.returncode == 0, done.stderr
    assert out.read_text() == (ROOT / "sparse_flash_jax" / "time_shares.json").read_text()


def test_train_step_compares_attention_in_one_model(tmp_path):
    out = tmp_path / "train-step.json"
    kinds = ("none", "dense", "causal", "hash", "centred")
    done = _run("train_step.py", "--quick", "--attention", *kinds, "--buckets", 8, "--out", out)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    _check_environment(result["environment"])
    assert _finite(result)
    steps = {step["attention"]: step for step in result["steps"]}
    assert list(steps) == ["none", "dense", "causal", "hash8", "centred8"]
    dense, sparse = steps["dense"], steps["hash8"]
    assert len({step["parameters"] for step in steps.values()}) == 1

    # One loss where the mask is one, another where it is not.
    assert math.isclose(dense["loss"]["first"], steps["causal"]["loss"]["first"], rel_tol=1e-5)
    assert len({round(steps[name]["loss"]["first"], 4) for name in ("none", "dense", "hash8", "centred8")}) == 4
    assert all(step["loss"]["last"] < step["loss"]["first"] for step in steps.values())

    # 2 blocks of shared q and k: q, v, out and 8 for the MLP, of width 64; 128 tokens; 256 of them, one sequence.
    model = 6 * (2 * 11 * 64**2 + 128 * 64) * 256
    attention = 12 * 64 * 2 * 256 * 257 / 2
    assert dense["flops"] == {"model": model, "attention": attention}
    assert steps["none"]["flops"] == {"model": model, "attention": 0}
    assert sparse["flops"] == {"model": model, "attention": attention / 8}
    assert dense["visible"] == {"first": 1, "last": 1}
    assert 0 < sparse["visible"]["first"] < 0.3
    assert dense["mfu"] is None  # the peak of a CPU is not known
    assert sparse["speedup"]["over_dense"] == dense["seconds"]["median"] / sparse["seconds"]["median"]
    assert sparse["tokens_per_second"] == 256 / sparse["seconds"]["median"]
    assert dense["memory_bytes"]["peak"] > sparse["memory_bytes"]["held"] > 0


def test_context_compares_divided_sequences_with_one_device(tmp_path):
    out = tmp_path / "context.json"
    way = ("--exchanges", "ring", "--layouts", "zigzag", "--buckets", 0)
    done = _run("context.py", "--quick", "--check", "--devices", 2, *way, "--out", out)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    _check_environment(result["environment"])
    assert _finite(result)
    assert result["devices"] == 2
    (case,) = result["cases"]
    assert (case["pattern"], case["exchange"], case["layout"]) == ("causal", "ring", "zigzag")
    assert case["seconds"].keys() == {"forward_backward", "one_device"}
    assert case["error"].keys() == {"o", "dq", "dk", "dv"}
    assert max(case["error"].values()) < 1e-5
    # Of q, k, v, do and o, dq, dk, dv, each device holds a half.
    tensor = 4 * 256 * 4 * 64
    assert 8 * tensor / 2 <= case["memory_bytes"]["held"] < 9 * tensor / 2


def test_context_counts_what_each_device_does(tmp_path):
    out = tmp_path / "context-work.json"
    done = _run("context.py", "--quick", "--count", "--buckets", 0, "--out", out)
    assert done.returncode == 0, done.stderr
    work = json.loads(out.read_text())["work"]
    assert [(row["devices"], row["layout"]) for row in work] == [
        (devices, layout) for devices in (4, 8) for layout in ("in order", "zigzag")
    ]
    for row in work:
        assert sum(row["pairs"]) == 256 * 257 / 2
        assert (row["most_over_mean"]["pairs"] == 1) == (row["layout"] == "zigzag")


def test_blocks_relate_times_to_tiles(tmp_path):
    out = tmp_path / "blocks.json"
    done = _run("blocks.py", "--quick", "--out", out)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    _check_environment(result["environment"])
    assert _finite(result)
    assert result["flex_attention"] == "not run: no GPU"
    half, all_blocks, sinks, top_k = result["cases"]

    # 4 blocks of 64 a side, 10 tiles causal: 5 of them; all; and each block with the best one before it.
    assert half["tiles"]["share"] == 0.5
    assert half["tiles"]["density"] < 0.5
    assert (all_blocks["tiles"]["share"], all_blocks["tiles"]["density"]) == (1, 1)
    assert (top_k["tiles"]["executed"], top_k["tiles"]["causal"]) == (7, 10)
    # Each sees 64 tokens, its own included, and from 64 on those of the 4 sinks that its window has left behind.
    pairs = 64 * 65 / 2 + 192 * 64 + 1 + 2 + 3 + 4 * (192 - 3)
    assert math.isclose(sinks["tiles"]["density"], pairs / (256 * 257 / 2))

    timed = {"blocks": {"given", "made"}, "sinks": {"given"}, "top_k": {"made"}}
    for case in result["cases"]:
        assert case["failed"] == {}
        assert case["case"] in done.stdout
        assert case["seconds"].keys() == timed[case["kind"]] | {"dense"}
        dense = case["seconds"]["dense"]["median"]
        for name, ratio in case["over_share"].items():
            seconds = case["seconds"][name]["median"]
            assert math.isclose(case["speedup"][name], dense / seconds)
            assert math.isclose(ratio, seconds / dense / case["tiles"]["share"])


def test_blocks_go_on_after_a_failure(tmp_path):
    out = tmp_path / "blocks.json"
    quick = ("--quick", "--densities", 100, "--lengths", 64)
    done = _run("blocks.py", *quick, "--implementation", "triton", "--out", out)
    assert done.returncode == 0, done.stderr
    cases = json.loads(out.read_text())["cases"]
    assert [case["kind"] for case in cases] == ["blocks", "sinks", "top_k"]
    for case in cases:
        assert case["seconds"].keys() == {"dense"}
        assert all("needs an NVIDIA GPU" in case["failed"][name] for name in case["failed"] if name != "tiles")
        assert {"given", "made"} & case["failed"].keys()


def test_masks_of_blocks_have_the_density_asked_for():
    program = """
import sys
sys.path.insert(0, sys.argv[1])
from block_cases import BlockCase
for percent in (10, 50, 100):
    case = BlockCase("blocks", 1, 2048, 3, 64, "float32", block=64, percent=percent)
    mask = case.block_mask()
    assert mask.shape == (1, 3, 32, 32)
    assert (mask == case.block_mask()).all()
    assert mask[:, :, range(32), range(32)].all()
    for head in mask[0]:
        row, column = head.nonzero()
        assert (column <= row).all()
        assert len(row) == round(percent / 100 * 32 * 33 / 2), len(row)
    assert (mask[0, 0] != mask[0, 1]).any() == (percent < 100)
"""
    command = [sys.executable, "-c", program, str(ROOT / "benchmarks")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_scaling_compares_meshes_with_one_device(tmp_path):
    out = tmp_path / "scaling.json"
    done = _run("scaling.py", "--quick", "--attention", "centred", "--meshes", "data=2", "--out", out, devices=2)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    _check_environment(result["environment"])
    assert _finite(result)
    one, two = result["steps"]
    assert [(step["mesh"], step["devices"], step["batch"]) for step in (one, two)] == [
        ("data=1", 1, 2),
        ("data=2", 2, 4),
    ]
    assert one["efficiency"] == 1
    assert two["efficiency"] == two["tokens_per_second"] / one["tokens_per_second"] / 2


def test_tune_says_what_it_needs():
    done = _run("tune.py", "--implementation", "triton")
    assert done.returncode != 0
    assert "needs an NVIDIA GPU" in done.stderr


def test_a_stopped_run_keeps_what_it_measured(tmp_path):
    program = """
import os, pathlib, signal, sys
sys.path.insert(0, sys.argv[1])
from environment import written
result = {"cases": []}
with written(result, pathlib.Path(sys.argv[2])):
    result["cases"].append(1)
    os.kill(os.getpid(), signal.SIGTERM)
    result["cases"].append(2)
"""
    path = tmp_path / "result.json"
    command = [sys.executable, "-c", program, str(ROOT / "benchmarks"), str(path)]
    run = subprocess.run(
        command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert "stopped by SIGTERM" in run.stderr
    assert json.loads(path.read_text()) == {"cases": [1]}


def test_coverage_counts_and_times_both_schemes(tmp_path):
    out = tmp_path / "coverage.json"
    few = ("--vectors", "skewed", "--settings", "fixed", "--rounds", 1, "--heads", 2)
    done = _run("coverage.py", "--quick", *few, "--out", out)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    _check_environment(result["environment"])
    assert _finite(result)
    (record,) = result["coverage"]
    assert (record["vectors"], record["buckets"], record["chunk"]) == ("skewed", 16, 64)
    # Skewed: a bucket is longer than two chunks.
    assert record["covered"]["ours"] == 1 > record["covered"]["reformer"] > 0.5
    for share in ("top", "mass"):
        shares = record[share]
        assert 1 > shares["same_bucket"] == shares["ours"] >= shares["reformer"] > 0
    assert record["computed"]["reformer"] == 2 * 64 * 256 / (256 * 255 / 2)
    assert [speed["scheme"] for speed in result["speed"]] == ["dense", "reformer-fixed-1", "ours-fixed-1"]
    assert all(speed["seconds"]["median"] > 0 for speed in result["speed"])

    picture, counted, timed = (tmp_path / name for name in ("coverage.png", "counted.json", "timed.json"))
    counted.write_text(json.dumps(result | {"speed": []}))
    timed.write_text(json.dumps(result | {"coverage": []}))
    for results in ([counted], [counted, timed]):
        done = _run("plot_coverage.py", "--result", *results, "--out", picture)
        assert done.returncode == 0, done.stderr
        assert picture.read_bytes().startswith(b"\x89PNG")
