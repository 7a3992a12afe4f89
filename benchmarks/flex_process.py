"""FlexAttention in a process of its own: this one needs no torch, and what ends that one costs one case."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def has_torch() -> bool:
    """Whether torch is installed beside this."""
    return importlib.util.find_spec("torch") is not None


class FlexProcess:
    """Runs a script that calls `answer_all`, from the first case on, and again after it has ended.

    JAX keeps three quarters of a GPU's memory for itself, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
    """

    def __init__(self, script: str, environment: dict[str, str] | None = None) -> None:
        """Takes the script's name, and environment variables that it has besides this process's own."""
        self.versions: dict[str, Any] = {}
        """Of torch and its CUDA, once it has run."""
        self._script = script
        self._environment = environment or {}
        self._greeted = False
        self._process: subprocess.Popen[str] | None = None

    def ask(self, case: dict[str, Any], samples: int) -> dict[str, Any]:
        """Returns the `seconds` of a case, or `failed` and why."""
        self.send(case, samples)
        return self.answer()

    def send(self, case: dict[str, Any], samples: int) -> None:
        """Asks for the seconds of a case, which `answer` then waits for."""
        if self._process is None or self._process.poll() is not None:
            command = [sys.executable, str(HERE / self._script)]
            environment = {**os.environ, **self._environment, "JAX_PLATFORMS": "cpu"}
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, text=True)
            self._greeted = False
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: so says its answer
            print(json.dumps({"case": case, "samples": samples}), file=self._process.stdin, flush=True)

    def answer(self) -> dict[str, Any]:
        """Returns what `send` asked for."""
        if not self._greeted:
            greeting = self._line()
            if "failed" in greeting:
                return greeting
            self.versions, self._greeted = greeting, True
        return self._line()

    def _line(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"failed": f"{self._script} ended with status {self._process.wait()}"}

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def answer_all(measured: Callable[[dict[str, Any], int], dict[str, Any]], versions: dict[str, Any]) -> None:
    """Answers each line on standard input with one, the versions first: what a `FlexProcess` runs.

    Args:
        measured: a case's answer, with its `seconds`, from its fields and the number of samples.
        versions: of torch and its CUDA.
    """
    answers = sys.stdout

    def answer(what: dict[str, Any]) -> None:
        print(json.dumps(what), file=answers, flush=True)

    with contextlib.redirect_stdout(sys.stderr):
        answer(versions)
        for line in sys.stdin:
            request = json.loads(line)
            try:
                answer(measured(request["case"], request["samples"]))
            except Exception as error:  # whatever it is, the cases to come are to be measured
                answer({"failed": f"{type(error).__name__}: {error}"})
