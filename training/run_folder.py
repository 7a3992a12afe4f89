"""Where a run keeps its files, and which checkpoint it goes on from.

DIR/config.json   DIR/metrics.jsonl   DIR/checkpoints/STEP/   DIR/loss.png   DIR/sample.txt or DIR/sample.png
"""

from pathlib import Path
from typing import NamedTuple

from training.config import NEWEST, TrainConfig
from training.errors import CheckpointError, ConfigError
from training.processes import from_first

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

    @property
    def picture(self) -> Path:
        """Held-out images and how the model completes them."""
        return self.root / "sample.png"


def choose_folder(config: TrainConfig) -> RunFolder:
    """The folder that the settings ask for, made if there is none: a number is taken by one run alone.

    Raises:
        CheckpointError: `--resume` finds no checkpoint, or an older one than the run's newest without a new --out.
        ConfigError: `--out` already holds a run and `--resume` is not given, or a folder cannot be made.
    """
    if config.resume is None:
        root = _claim_next(config.name) if config.out is None else _claim(config.out)
        return RunFolder(root, None)
    root = resumed_root(config)
    if config.resume == NEWEST:
        return RunFolder(root, _newest_checkpoint(root))
    path = Path(config.resume)
    checkpoint = path if _is_checkpoint(path) else _newest_checkpoint(root)
    if not checkpoint.is_dir():
        raise CheckpointError(f"no checkpoint {checkpoint}")
    if config.out is not None and config.out.resolve() != root.resolve():
        return RunFolder(_claim(config.out), checkpoint)
    newest = _newest_checkpoint(root)
    if newest.name != checkpoint.name:
        raise CheckpointError(f"{root} has gone on to step {newest.name}; name a new folder with --out to branch off")
    return RunFolder(root, checkpoint)


def choose_folder_together(config: TrainConfig) -> RunFolder:
    """`choose_folder` of the first process, for all."""
    paths = lambda: [None if path is None else str(path) for path in choose_folder(config)]
    root, resume_from = from_first(paths, (CheckpointError, ConfigError))
    return RunFolder(Path(str(root)), None if resume_from is None else Path(resume_from))


def resumed_root(config: TrainConfig) -> Path:
    """The folder of the run that `--resume` goes on with.

    Raises:
        CheckpointError: the newest is asked for, and there is none.
    """
    if config.resume is None or config.resume == NEWEST:
        return _newest_folder(config.name) if config.out is None else config.out
    path = Path(config.resume)
    if _is_checkpoint(path):
        return path.parent.parent
    return path.parent if path.name == "checkpoints" else path


def saved_run(path: Path) -> RunFolder:
    """The run in a folder with its newest checkpoint, or the run of one checkpoint with that one.

    Raises:
        CheckpointError: there is no run, or it has no such checkpoint.
    """
    if _is_checkpoint(path):
        run = RunFolder(path.parent.parent, path)
    else:
        root = path.parent if path.name == "checkpoints" else path
        steps = steps_in(root)
        run = RunFolder(root, root / "checkpoints" / str(steps[-1]) if steps else None)
    if not run.config.is_file():
        raise CheckpointError(f"no run in {run.root}: it has no {run.config.name}")
    if run.resume_from is None or not run.resume_from.is_dir():
        raise CheckpointError(f"no checkpoint {run.resume_from or f'in {run.root}'}")
    return run


def _is_checkpoint(path: Path) -> bool:
    return path.name.isdigit() and path.parent.name == "checkpoints"


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


def _claim(root: Path) -> Path:
    if steps_in(root):
        raise ConfigError(f"{root} already holds a run; add --resume to go on with it, or take another --out")
    if (root / "metrics.jsonl").exists():
        raise ConfigError(f"{root} already holds a run without a checkpoint; delete it, or take another --out")
    return _make(root, exist_ok=True)


def _claim_next(name: str) -> Path:
    number = max(_numbered(name), default=0) + 1
    while True:
        try:
            return _make(_RUNS / f"{name}-{number}", exist_ok=False)
        except FileExistsError:  # another run was faster
            number += 1


def _make(root: Path, *, exist_ok: bool) -> Path:
    try:
        root.mkdir(parents=True, exist_ok=exist_ok)
    except OSError as error:
        if isinstance(error, FileExistsError) and not exist_ok:
            raise
        raise ConfigError(f"{root}: cannot make this folder: {error.strerror or error}") from error
    return root


def _newest_folder(name: str) -> Path:
    for _, path in sorted(_numbered(name).items(), reverse=True):
        if steps_in(path):
            return path
    raise CheckpointError(f"no checkpoint in {_RUNS / name}-*; leave out --resume to start afresh")
