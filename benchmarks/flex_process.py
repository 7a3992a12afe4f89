"""FlexAttention in a process of its own: this one needs no torch, and what ends that one costs one case."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from block_cases import BlockCase

SCRIPT = Path(__file__).resolve().parent / "flex_blocks.py"


def has_torch() -> bool:
    """Whether torch is installed beside this."""
    return importlib.util.find_spec("torch") is not None


class FlexProcess:
    """Runs `flex_blocks.py` from the first case on, and again after it has ended.

    JAX keeps three quarters of a GPU's memory for itself, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
    """

    def __init__(self) -> None:
        self.versions: dict[str, Any] = {}
        """Of torch and its CUDA, once it has run."""
        self._process: subprocess.Popen[str] | None = None

    def ask(self, case: BlockCase, samples: int) -> dict[str, Any]:
        """Returns `seconds` of forward + backward and of building the mask, or `failed` and why."""
        if self._process is None or self._process.poll() is not None:
            command = [sys.executable, str(SCRIPT)]
            environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, text=True)
            answer = self._answer()
            if "failed" in answer:
                return answer
            self.versions = answer
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: so says its answer
            print(json.dumps({"case": case._asdict(), "samples": samples}), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"failed": f"{SCRIPT.name} ended with status {self._process.wait()}"}

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
