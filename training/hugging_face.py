"""Documents out of Hugging Face data sets: by name, out of a `save_to_disk` folder, or out of data files.

Which splits are read is decided here; what is held out of a data set without a split for it, in data.py. The package
`datasets` is imported when it is asked for, and not before.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from training.config import DataConfig
from training.errors import DataError
from training.sources import Document

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

PREFIX = "hf:"
_LOADERS = {"json": "json", "jsonl": "json", "parquet": "parquet", "csv": "csv", "tsv": "csv", "txt": "text"}
_HELD_OUT_NAMES = {"valid": ("validation", "valid", "val", "dev"), "test": ("test",)}
# Of a stream that is cut short the held-out split is too, to the share that is held out of other texts.
_HELD_OUT_SHARE = 0.05
_ROWS_AT_ONCE = 256


def read_hugging_face(config: DataConfig) -> tuple[list[Document], list[Document] | None]:
    """The documents to train on and those of the data set's own held-out split; None where it has none.

    A document is named by its split and row, whether streamed or not.

    Args:
        config: the source, `hf:NAME_OR_PATH`, and which configuration, split and field of it.

    Raises:
        DataError: no such data set, split or field, no text in it, or no package `datasets`.
    """
    try:
        import datasets
        from datasets.exceptions import DatasetGenerationError
    except ImportError as error:
        raise DataError(
            f"{config.source}: needs the package datasets: pip install datasets, or the extra [datasets] of this one"
        ) from error
    limit = config.max_megabytes * 1e6 if config.streaming else math.inf
    try:
        splits = _load(datasets, config)
        names = config.split.split("+")
        own = [name for name in _HELD_OUT_NAMES[config.held_out] if name in splits and name not in names]
        train = _taken(names, splits, config, limit)
        return train, _taken(own[:1], splits, config, limit * _HELD_OUT_SHARE) if own else None
    except DataError:
        raise
    except Exception as error:  # the library has no common base of its errors
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else None
        raise DataError(
            f"{config.source}: cannot be read: {_short(cause or error)}; name a data set of the hub, or its file or"
            " folder, and --data.configuration where it has several"
        ) from error


def _load(datasets: ModuleType, config: DataConfig) -> "Mapping[str, Dataset | IterableDataset]":
    """The splits of a data set by name; one that was saved by itself is called train."""
    name = config.source.removeprefix(PREFIX)
    path = Path(name).expanduser()
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = datasets.load_from_disk(str(path))
        return saved if isinstance(saved, dict) else {"train": saved}
    options = {"name": config.configuration, "streaming": config.streaming}
    loader = next((_LOADERS[suffix] for suffix in path.name.lower().split(".")[1:] if suffix in _LOADERS), None)
    if loader is None or path.is_dir():
        return datasets.load_dataset(str(path) if path.is_dir() else name, **options)
    # Lines of a text file belong to one document.
    more = {"sample_by": "document"} if loader == "text" else {}
    return datasets.load_dataset(loader, data_files=str(path), **options, **more)


def _taken(
    names: list[str], splits: "Mapping[str, Dataset | IterableDataset]", config: DataConfig, limit: float
) -> list[Document]:
    """Documents of some splits, the first of them and as many more as stay within a number of bytes."""
    documents: list[Document] = []
    size = 0
    for name in names:
        if name not in splits:
            raise DataError(f"{config.source}: no split {name!r} for --data.split; it has: {', '.join(splits)}")
        for document in _documents(splits[name], name, config):
            size += len(document.text)
            if documents and size > limit:
                return documents
            documents.append(document)
    if not documents:
        raise DataError(f"{config.source}: no text in field {config.field!r} of split {'+'.join(names)}")
    return documents


def _documents(split: "Dataset | IterableDataset", name: str, config: DataConfig) -> Iterator[Document]:
    field = config.field
    if split.column_names is not None:  # a stream may not know its fields before it is read
        _require_field(field, split.column_names, config)
        split = split.select_columns([field])
    row = 0
    for some in split.iter(_ROWS_AT_ONCE):
        rows = cast(dict[str, list[Any]], some)
        _require_field(field, rows, config)
        for text in rows[field]:
            if not isinstance(text, str | None):
                kind = type(text).__name__
                raise DataError(f"{config.source}: field {field!r} of {name}, row {row}: expected text, got {kind}")
            if text:
                yield Document(f"{name}/{row}", text.encode())
            row += 1


def _require_field(field: str, known: Iterable[str], config: DataConfig) -> None:
    if field not in known:
        raise DataError(f"{config.source}: no field {field!r} for --data.field; it has: {', '.join(known)}")


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."
