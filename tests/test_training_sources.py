"""Every kind of source, and the one line that says what is wrong with a bad one."""

import gzip
import json
import lzma
import tarfile

import pytest

from training.errors import DataError
from training.sources import Document, read_documents

TEXT = "one line\nnaïve café\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_text(TEXT, "utf-8")
    (tmp_path / "b" / "c.py").write_text("x = 1\n", "utf-8")
    (tmp_path / ".hidden").write_text("no", "utf-8")
    return tmp_path


def test_file(folder):
    assert read_documents(str(folder / "a.txt")) == [Document("a.txt", TEXT.encode())]


def test_folder_is_sorted_without_hidden_files(folder):
    assert [document.name for document in read_documents(str(folder))] == ["a.txt", "b/c.py"]


def test_glob(folder):
    assert [document.name for document in read_documents(f"{folder}/**/*.py")] == ["b/c.py"]


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_compressed(tmp_path, suffix, compress):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(compress(TEXT.encode()))
    assert read_documents(str(path))[0].text == TEXT.encode()


@pytest.mark.parametrize(("suffix", "mode"), [("tar", "w"), ("tar.gz", "w:gz"), ("tar.xz", "w:xz")])
def test_archive(folder, suffix, mode):
    path = folder.parent / f"all.{suffix}"
    with tarfile.open(path, mode) as archive:
        archive.add(folder / "b", "b")
        archive.add(folder / "a.txt", "a.txt")
    assert [document.name for document in read_documents(str(path))] == ["a.txt", "b/c.py"]


def test_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"id": index, "body": f"text {index}"}) + "\n\n" for index in range(3)))
    assert read_documents(f"{path}:body") == [Document(f"a.jsonl:{2 * i + 1}", f"text {i}".encode()) for i in range(3)]


def test_other_encoding(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT.encode("latin-1"))
    assert read_documents(str(path), "latin-1")[0].text == TEXT.encode()


def bad_source(folder, kind):
    path = folder / "bad"
    match kind:
        case "missing":
            return str(folder / "nowhere")
        case "no match":
            return f"{folder}/*.zzz"
        case "empty folder":
            path.mkdir()
            return str(path)
        case "empty file":
            path.write_bytes(b"")
            return str(path)
        case "encoding":
            path.write_bytes(b"fine \xff not")
            return str(path)
        case "gzip" | "xz" | "tar.xz":
            path = folder / f"bad.{kind.replace('gzip', 'gz')}"
            path.write_bytes(b"not compressed")
            return str(path)
        case "cut":
            path = folder / "bad.xz"
            path.write_bytes(lzma.compress(TEXT.encode() * 99)[:-20])
            return str(path)
        case "zip":
            (folder / "bad.zip").write_bytes(b"PK")
            return str(folder / "bad.zip")
        case "json":
            (folder / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
            return f"{folder}/bad.jsonl:text"
        case _:
            (folder / "bad.jsonl").write_text('{"body": "a"}\n')
            return f"{folder}/bad.jsonl:text"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "no such file or folder"),
        ("no match", "no files there"),
        ("empty folder", "no files there"),
        ("empty file", "no text in it"),
        ("encoding", r"not utf-8 text at byte 5.*--data\.encoding"),
        ("gzip", "cannot be read"),
        ("xz", "cannot be read"),
        ("tar.xz", "cannot be read"),
        ("cut", "cannot be read"),
        ("zip", "not supported"),
        ("json", "line 2 is not JSON"),
        ("field", "line 1 has no text field 'text'; it has: body"),
    ],
)
def test_bad_sources(folder, kind, message):
    with pytest.raises(DataError, match=message) as caught:
        read_documents(bad_source(folder, kind))
    assert "\n" not in str(caught.value)


def test_unknown_encoding(folder):
    with pytest.raises(DataError, match="no encoding 'klingon'"):
        read_documents(str(folder), "klingon")
