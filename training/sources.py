"""Reading documents: files, folders, globs, compressed files, archives and JSON lines.

A document is a name and its text as UTF-8 bytes. What cannot be read ends in one DataError that names the file; which
documents are held out is decided in data.py.
"""

import glob
import gzip
import json
import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from training.errors import DataError

_JSON_LINES = re.compile(r"(?P<path>.+\.jsonl(?:\.gz|\.xz)?):(?P<field>[^/:]+)")
_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz")
_UNSUPPORTED = (".zip", ".zst", ".bz2", ".7z", ".rar", ".parquet", ".arrow")


class Document(NamedTuple):
    """A text and where it comes from.

    Attributes:
        name: path relative to the source, or FILE:LINE for JSON lines.
        text: UTF-8 bytes.
    """

    name: str
    text: bytes


def read_documents(source: str, encoding: str = "utf-8") -> list[Document]:
    """All documents of a source, in a fixed order.

    Args:
        source: path of a file or folder, a glob, or FILE.jsonl:FIELD.
        encoding: of the files; the documents come out in UTF-8.

    Raises:
        DataError: nothing there, not readable, not in this encoding, or empty.
    """
    match = _JSON_LINES.fullmatch(source)
    field = match["field"] if match else None
    files, root = _files(match["path"] if match else source)
    documents = []
    for path in files:
        name = path.relative_to(root).as_posix()
        if field is not None:
            found = _json_lines(path, name, field, encoding)
        elif path.name.endswith(_ARCHIVES):
            found = _archive(path, encoding)
        else:
            found = iter([Document(name, transcode(read_bytes(path), encoding, str(path)))])
        documents.extend(document for document in found if document.text)
    if not documents:
        raise DataError(f"{source}: no text in it")
    return documents


def read_bytes(path: Path) -> bytes:
    """The contents of a file, decompressed if it ends in .gz or .xz.

    Raises:
        DataError: the file cannot be opened or decompressed.
    """
    if path.suffix in _UNSUPPORTED:
        raise DataError(f"{path}: {path.suffix} is not supported; use plain text, .gz, .xz, .tar.gz, .tar.xz or .jsonl")
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                return file.read()
        if path.suffix == ".xz":
            with lzma.open(path) as file:
                return file.read()
        return path.read_bytes()
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path}: cannot be read: {_reason(error)}") from error


def transcode(text: bytes, encoding: str, name: str) -> bytes:
    """Check that a text is in its encoding and give it in UTF-8.

    Raises:
        DataError: a byte that the encoding does not know, with its place; or no such encoding.
    """
    try:
        return text.decode(encoding).encode()
    except LookupError as error:
        raise DataError(f"there is no encoding {encoding!r}") from error
    except UnicodeError as error:
        place = f" at byte {error.start}" if isinstance(error, UnicodeDecodeError) else ""
        raise DataError(f"{name}: not {encoding} text{place}; name its encoding with --data.encoding") from error


def _files(source: str) -> tuple[list[Path], Path]:
    """The files that a path, folder or glob stands for, sorted, and the folder their names are relative to."""
    path = Path(source).expanduser()
    if path.is_file():
        return [path], path.parent
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path))]
        root = path
    elif glob.has_magic(source):
        files = [Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]
        literal = [part for part in path.parts if part]
        magic = next(index for index, part in enumerate(literal) if glob.has_magic(part))
        root = Path(*literal[:magic])
    else:
        raise DataError(f"{source}: no such file or folder, nor the name of a data set (python, enwik8, eltec, mnist)")
    if not files:
        raise DataError(f"{source}: no files there")
    return sorted(files, key=lambda file: file.relative_to(root).as_posix()), root


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)


def _archive(path: Path, encoding: str) -> Iterator[Document]:
    try:
        with tarfile.open(path) as archive:
            members = [member for member in archive if member.isfile() and not _hidden(Path(member.name))]
            for member in sorted(members, key=lambda member: member.name):
                file = archive.extractfile(member)
                if file is not None:
                    yield Document(member.name, transcode(file.read(), encoding, f"{path}:{member.name}"))
    except (OSError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path}: cannot be read: {_reason(error)}") from error


def _json_lines(path: Path, name: str, field: str, encoding: str) -> Iterator[Document]:
    for number, line in enumerate(transcode(read_bytes(path), encoding, str(path)).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}: line {number} is not JSON: {error}") from error
        text = record.get(field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            known = ", ".join(sorted(record)) if isinstance(record, dict) else type(record).__name__
            raise DataError(f"{path}: line {number} has no text field {field!r}; it has: {known}")
        try:
            yield Document(f"{name}:{number}", text.encode())
        except UnicodeEncodeError as error:
            raise DataError(f"{path}: line {number}: field {field!r} is not valid Unicode text") from error


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
