"""The default text: Python source of the standard library and of installed packages.

It needs no download. Files are taken in the order of a stable hash of their relative path until a size is reached, so
that a small budget still holds a mixture, and come out sorted by path.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from training.errors import DataError
from training.sources import Document

_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "test", "tests", "testing", "idlelib", "pydoc_data", "encodings"}
# Longer files are mostly generated tables; shorter ones are empty __init__ files.
_LARGEST_FILE, _SMALLEST_FILE = 200_000, 200


def stable_hash(name: str) -> int:
    """A 64-bit hash of a name, the same on every machine and run."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest())


def python_documents(max_bytes: int) -> list[Document]:
    """Python files of this installation, each a document, up to `max_bytes` in all.

    Raises:
        DataError: no source files are installed.
    """
    paths = sysconfig.get_paths()
    roots = dict.fromkeys(Path(paths[name]) for name in ("stdlib", "purelib", "platlib"))
    found = {}
    for root in roots:
        for path in _python_files(root):
            found.setdefault(path.relative_to(root).as_posix(), path)
    documents, size = [], 0
    for name in sorted(found, key=lambda name: (stable_hash(name), name)):
        text = _source_text(found[name])
        if text is None:
            continue
        if size + len(text) > max_bytes:
            break
        size += len(text)
        documents.append(Document(name, text))
    if not documents:
        raise DataError(f"no Python source under {', '.join(map(str, roots))}; name a text with --data")
    return sorted(documents)


def _python_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS and not name.startswith(".")]
        yield from (Path(folder, name) for name in files if name.endswith(".py"))


def _source_text(path: Path) -> bytes | None:
    try:
        if not _SMALLEST_FILE <= path.stat().st_size <= _LARGEST_FILE:
            return None
        text = path.read_bytes()
        text.decode()
    except (OSError, UnicodeDecodeError):
        # Another package's unreadable or old-style file is no reason to stop: there are thousands.
        return None
    return text
