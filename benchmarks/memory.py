"""Peak memory of forward and backward. Each case runs in a process of its own, clear of what others left behind.

Reads Linux's /proc.

python benchmarks/memory.py CASE [--length T]      prints one case's figures as JSON
"""

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
from passes import dense_calls, planned_memory, sparse_step
from selection import Case, select

KIB = 1024


def memory(case: Case, length: int | None, implementation: str | None) -> dict[str, Any]:
    """Measures a case, cut to `length` if that is given, in a new process."""
    command = [sys.executable, __file__, str(case)]
    command += [] if length is None else ["--length", str(length)]
    command += [] if implementation is None else ["--implementation", implementation]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{case} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def shortened(case: Case, length: int | None) -> Case:
    """Returns the case at another length."""
    return case if length is None else dataclasses.replace(case, shape=case.shape._replace(T=length, S=None))


def _measure(case: Case, implementation: str | None) -> dict[str, Any]:
    call = sparse_step(case, implementation)
    compiled = call.compile()
    jax.block_until_ready(call.args)
    _forget_peak()
    before = _peak()
    jax.block_until_ready(compiled(*call.args))
    peak = _peak()
    ours = planned_memory(compiled)
    dense = planned_memory(dense_calls(case, "xla")["dense_forward_backward"].compile())
    return {
        "case": str(case),
        "length": case.shape.T,
        "peak_rss_growth_bytes": peak - before,
        "temporary_bytes": ours.temp_size_in_bytes,
        "output_bytes": ours.output_size_in_bytes,
        "argument_bytes": ours.argument_size_in_bytes,
        "dense_temporary_bytes": dense.temp_size_in_bytes,
    }


def _forget_peak() -> None:
    """Sets the process's peak to what it holds now, or compilation would hide what a short case takes."""
    Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """Peak resident bytes. Not `getrusage`: its figure starts from the parent's, and cannot be set back."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return KIB * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def main() -> None:
    """Measures the one case that is named."""
    parser = argparse.ArgumentParser(description="Peak memory of one case, as JSON.")
    parser.add_argument("case")
    parser.add_argument("--length", type=int, help="cut or stretch the case to this many tokens")
    parser.add_argument("--implementation", help="None picks for the device")
    args = parser.parse_args()
    (case,) = select([args.case], jax.default_backend())
    print(json.dumps(_measure(shortened(case, args.length), args.implementation)))


if __name__ == "__main__":
    main()
