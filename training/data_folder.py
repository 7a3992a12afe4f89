"""Where data sets that are known by name lie: in one folder, compressed or not."""

import os
from collections.abc import Sequence
from pathlib import Path

from training.config import DataConfig
from training.errors import DataError

_DATA_VARIABLE = "SPARSE_FLASH_DATA"


def named_file(config: DataConfig, name: str, candidates: Sequence[str]) -> Path:
    """The first of these files that is there, in the folder of the settings or of the environment, else in ./data.

    Raises:
        DataError: none is there.
    """
    folder = config.folder or Path(os.environ.get(_DATA_VARIABLE) or "data")
    for candidate in candidates:
        path = folder.expanduser() / candidate
        if path.exists():
            return path
    raise DataError(
        f"{name}: no {candidates[0]} in {folder}; name the folder that holds it with --data-dir or ${_DATA_VARIABLE}"
    )
