"""Where a run keeps its files, and which checkpoint it goes on from.

DIR/config.json   DIR/metrics.jsonl   DIR/checkpoints/STEP/   DIR/loss.png   DIR/sample.txt
"""

from pathlib import Path
from typing import NamedTuple

from training.cli import resumes_newest
from training.config import TrainConfig
from training.errors import CheckpointError, ConfigError

_RUNS = Path("runs")


class RunFolder(NamedTuple):
    """The files of a run.

    Attributes:
        root: the run's folder.
        resume_from: the checkpoint to go on from, the folder of a step; None to start afresh.
    """

    root: Path
    resume_from: Path | None

    @property
    def config(self) -> Path:
        """The settings."""
        return self.root / "config.json"

    @property
    def metrics(self) -> Path:
        """One JSON record a line."""
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints, each in a folder named by its step."""
        return self.root / "checkpoints"

    @property
    def plot(self) -> Path:
        """The loss curve."""
        return self.root / "loss.png"

    @property
    def sample(self) -> Path:
        """The sampled continuation."""
        return self.root / "sample.txt"


def choose_folder(config: TrainConfig) -> RunFolder:
    """The folder that the settings ask for.

    Raises:
        CheckpointError: `--resume` finds no checkpoint, or an older one than the run's newest without a new --out.
        ConfigError: `--out` already holds a run and `--resume` is not given.
    """
    if config.resume is None:
        root = _next_folder(config.name) if config.out is None else config.out
        if steps_in(root):
            raise ConfigError(f"{root} already holds a run; add --resume to go on with it, or take another --out")
        return RunFolder(root, None)
    if resumes_newest(config):
        root = _newest_folder(config.name) if config.out is None else config.out
        return RunFolder(root, _newest_checkpoint(root))
    path = Path(config.resume)
    if path.name.isdigit() and path.parent.name == "checkpoints":
        root, checkpoint = path.parent.parent, path
        if not path.is_dir():
            raise CheckpointError(f"no checkpoint {path}")
    else:
        root = path.parent if path.name == "checkpoints" else path
        checkpoint = _newest_checkpoint(root)
    if config.out is not None and config.out.resolve() != root.resolve():
        if steps_in(config.out):
            raise ConfigError(f"{config.out} already holds a run; take another --out")
        return RunFolder(config.out, checkpoint)
    newest = _newest_checkpoint(root)
    if newest.name != checkpoint.name:
        raise CheckpointError(f"{root} has gone on to step {newest.name}; name a new folder with --out to branch off")
    return RunFolder(root, checkpoint)


def steps_in(root: Path) -> list[int]:
    """The steps that a run has checkpoints of, oldest first."""
    folder = root / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def _newest_checkpoint(root: Path) -> Path:
    steps = steps_in(root)
    if not steps:
        raise CheckpointError(f"no checkpoint in {root}; leave out --resume to start afresh")
    return root / "checkpoints" / str(steps[-1])


def _numbered(name: str) -> dict[int, Path]:
    prefix = f"{name}-"
    found = _RUNS.glob(f"{prefix}*")
    return {int(path.name.removeprefix(prefix)): path for path in found if path.name.removeprefix(prefix).isdigit()}


def _next_folder(name: str) -> Path:
    return _RUNS / f"{name}-{max(_numbered(name), default=0) + 1}"


def _newest_folder(name: str) -> Path:
    for _, path in sorted(_numbered(name).items(), reverse=True):
        if steps_in(path):
            return path
    raise CheckpointError(f"no checkpoint in {_RUNS / name}-*; leave out --resume to start afresh")
