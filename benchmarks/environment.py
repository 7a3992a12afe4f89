"""What a result was measured on, and with what; the same in words, for figures and below tables."""

import contextlib
import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).resolve().parents[1]


def environment() -> dict[str, Any]:
    """Returns device, processor, versions, commit, command and date."""
    first = jax.devices()[0]
    return {
        "device": f"{jax.device_count()} x {first.device_kind}",
        "platform": first.platform,
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "python": platform.python_version(),
        "commit": _commit(),
        "command": _command(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def on_one(environment: dict[str, Any]) -> dict[str, Any]:
    """Returns the environment of what ran on one of the devices that were there."""
    return environment | {"device": f"1 x {environment['device'].split(' x ', 1)[1]}"}


def device(environment: dict[str, Any]) -> str:
    """Returns the kind of device, and how many there were if several."""
    return environment["device"].removeprefix("1 x ")


def device_in_a_word(environment: dict[str, Any]) -> str:
    """Returns "H100" for "2 x NVIDIA H100 80GB HBM3": the first word with a number, or else the whole name."""
    name = environment["device"].split(" x ", 1)[1]
    return next((word for word in name.split() if any(map(str.isdigit, word))), name)


def described(*environments: dict[str, Any]) -> str:
    """Returns on what results were measured: each device, JAX version and commit among their environments."""
    devices = _distinct(_machine(each) for each in environments)
    versions = _distinct(each["jax"] for each in environments)
    commits = _distinct(each["commit"][:7] for each in environments if each["commit"] is not None)
    named = f"commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}" if commits else "no commit"
    return f"{' and '.join(devices)}, jax {' and '.join(versions)}, {named}"


def source(*environments: dict[str, Any]) -> str:
    """Returns the command that measured the first of these results, on what all of them were, and their files."""
    words = environments[0]["command"].split()
    command = " ".join(itertools.takewhile(lambda word: not word.startswith("-"), words))  # options are in the result
    files = ", ".join(f"`{name}`" for name in _distinct(each["file"] for each in environments if "file" in each))
    return f"`{command}` on {described(*environments)}{files and f'; data: {files}'}"


def load_result(path: Path) -> dict[str, Any]:
    """Returns a result, whose environment says in which file it is."""
    result = json.loads(path.read_text())
    return result | {"environment": result["environment"] | {"file": f"results/{path.name}"}}


def _machine(environment: dict[str, Any]) -> str:
    kind = device(environment)
    return f"{environment['processor']}, {environment['cores']} cores" if kind == "cpu" else kind


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


@contextlib.contextmanager
def written(result: dict[str, Any], path: Path | None) -> Iterator[Callable[[], None]]:
    """Writes a result when the block ends, however it ends: an interrupted run keeps what it has measured.

    Gives what writes it meanwhile, for runs that can be killed.
    """
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by SIGTERM"))
    try:
        yield lambda: None if path is None else _save(result, path)
    finally:
        signal.signal(signal.SIGTERM, before)
        if path is not None:
            write(result, path)


def write(result: dict[str, Any], path: Path) -> None:
    """Writes a result as JSON, and says so."""
    _save(result, path)
    print(f"\nwritten to {path}")


def _save(result: dict[str, Any], path: Path) -> None:
    """Writes a result as JSON, of which the path has a whole one at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    part.replace(path)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    """The commit, marked where a tracked file differs from it, or what $GIT_COMMIT says; None outside a repository."""
    if said := os.environ.get("GIT_COMMIT"):
        return said
    try:
        commit = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit} with changes" if changed else commit


def _git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _command() -> str:
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
    arguments = (Path(x).name if os.path.isabs(x) else x for x in sys.argv[1:])  # folders say nothing elsewhere
    return shlex.join(["python", str(name), *arguments])
