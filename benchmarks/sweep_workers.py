"""Many processes compile for `sweeps.py` side by side; then one after the other times what it has, and ends.

A process that ends gives its GPU memory back, which JAX's allocator keeps while it lives. So no timing overlaps with
another or with compilation, and each has the memory that those before it had.
"""

import contextlib
import multiprocessing
import os
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any, Literal, NamedTuple

from environment import environment
from flex_process import FlexProcess
from sweep_calls import Programs, compiled, timed, why
from sweep_cases import SweepCase, shares

Record = dict[str, Any]
_SPAWN = multiprocessing.get_context("spawn")  # a fork would share a parent's threads


class Options(NamedTuple):
    """How cases are computed and timed."""

    samples: int
    implementation: str | None
    dense: Literal["xla", "cudnn"]


def probed() -> dict[str, Any]:
    """Returns `environment()` of a process that ends with that, so that this one never takes hold of the GPU."""
    with _SPAWN.Pool(1) as pool:
        return pool.apply(environment)


def in_this_process(cases: list[SweepCase], options: Options) -> Iterator[tuple[SweepCase, Record]]:
    """Compiles and times case by case."""
    for case in cases:
        yield case, _timed(_compiled(case, options), options.samples)


class Workers:
    """Processes that have compiled their cases, or do, and then wait for their turn."""

    def __init__(self, cases: list[SweepCase], options: Options, processes: int):
        # Or each would take most of the GPU's memory from the start, and could take no more than that.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
        self._workers = [_Worker(share, options) for share in shares(cases, processes)]

    def compiled(self) -> Iterator[str]:
        """Waits for one after the other to have compiled all, and says so."""
        for worker in self._workers:
            yield worker.ready()

    def records(self) -> Iterator[tuple[SweepCase, Record]]:
        """Times case by case; the processes end one after the other."""
        for worker in self._workers:
            yield from worker.records()

    def close(self) -> None:
        """Ends all processes."""
        for worker in self._workers:
            worker.end()


class _Worker:
    """A process with its share of the cases, and this end of the pipe to it."""

    def __init__(self, share: list[SweepCase], options: Options):
        self._share = share
        self._pipe, other = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_work, args=(other, share, options), daemon=True)
        self._process.start()
        other.close()  # of this process, so that it sees the end of the other's

    def ready(self) -> str:
        """Waits until all is compiled, or the process has ended, and says which."""
        try:
            return self._pipe.recv()
        except EOFError:
            self._process.join()
            return f"ended with status {self._process.exitcode}"

    def records(self) -> Iterator[tuple[SweepCase, Record]]:
        """Has the process time its cases; those that it does not come to have failed."""
        left = list(self._share)
        with contextlib.suppress(EOFError, OSError):  # it has ended
            self._pipe.send("go")
            while left:
                record = self._pipe.recv()
                yield left.pop(0), record
        self._process.join()  # and its memory is free
        for case in left:
            yield case, failure(f"its process ended with status {self._process.exitcode}")

    def end(self) -> None:
        """Ends the process, whatever it does."""
        self._process.kill()
        self._process.join()


def _work(pipe: Connection, share: list[SweepCase], options: Options) -> None:
    """What a process does: compile all of its share, wait for its turn, time all."""
    programs: list[Programs | Record | None] = [_compiled(case, options) for case in share]
    pipe.send(f"{len(share)} cases compiled")
    pipe.recv()
    for i in range(len(share)):
        pipe.send(_timed(programs[i], options.samples))
        programs[i] = None


def _compiled(case: SweepCase, options: Options) -> Programs | Record:
    try:
        return compiled(case, options.implementation, options.dense)
    except Exception as error:  # whatever it is, the other cases are to be measured
        return failure(why(error))


def _timed(programs: Programs | Record | None, samples: int) -> Record:
    if not isinstance(programs, Programs):
        return programs or failure("it is not compiled")
    try:
        return timed(programs, samples)
    except Exception as error:
        return failure(why(error))


def failure(reason: str) -> Record:
    """Returns the record of a case of which nothing was measured."""
    return {"seconds": {}, "failed": {"all": reason}}


class FlexCases:
    """FlexAttention, each case in a process of its own, which compiles beside the others and then waits."""

    def __init__(self, cases: list[SweepCase]):
        self.versions: dict[str, Any] = {}
        """Of torch and its CUDA, once it has run."""
        threads = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # else each process starts one for each core
        self._processes = [(case, FlexProcess("flex_sweeps.py", threads)) for case in cases]
        for case, process in self._processes:
            process.send(case._asdict(), samples=1)

    def records(self, samples: int) -> Iterator[tuple[SweepCase, Record]]:
        """Times case by case; the processes end one after the other."""
        for _, process in self._processes:
            process.answer()  # compiled; why it may have failed is said again below
        for case, process in self._processes:
            answer = process.ask(case._asdict(), samples)
            self.versions = self.versions or process.versions
            process.close()
            yield case, answer if "seconds" in answer else failure(answer["failed"][:400])

    def close(self) -> None:
        """Ends all processes."""
        for _, process in self._processes:
            process.close()
