"""Hugging Face data sets made here: every way to name one, streamed or not, and one line for each that is wrong."""

import os
import sys

# Before the libraries are imported, which read them once: nothing here needs a network, or finds one.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import datasets
import pytest
from datasets import config as library

from training.config import DataConfig
from training.data import load_corpus
from training.errors import DataError
from training.hugging_face import read_hugging_face
from training.tokens import ByteTokenizer

TEXTS = {part: [f"{part} {number}: naïve café\n" * 3 for number in range(30)] for part in ("train", "validation")}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def table(part):
    return datasets.Dataset.from_dict({"id": list(range(30)), "text": TEXTS[part]})


@pytest.fixture
def sources(tmp_path):
    """The same two splits, saved in each way that has them; and the training split alone."""
    both = datasets.DatasetDict({part: table(part) for part in TEXTS})
    both.save_to_disk(tmp_path / "saved")
    both["train"].save_to_disk(tmp_path / "alone")
    (tmp_path / "files").mkdir()
    for part, split in both.items():
        split.to_parquet(tmp_path / "files" / f"{part}.parquet")
    both["train"].to_json(tmp_path / "train.jsonl")
    both["train"].to_parquet(tmp_path / "train.parquet")
    return tmp_path


def read(path, **options):
    return read_hugging_face(DataConfig(source=f"hf:{path}", **options))


def texts(documents):
    return None if documents is None else [document.text.decode() for document in documents]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["saved", "files", "alone", "train.jsonl", "train.parquet", "*.jsonl"])
def test_splits_are_read(sources, name, streaming):
    train, held_out = read(sources / name, streaming=streaming)
    assert texts(train) == TEXTS["train"]
    assert [document.name for document in train] == [f"train/{row}" for row in range(30)]
    assert texts(held_out) == (TEXTS["validation"] if name in ("saved", "files") else None)


def test_a_stream_is_read_as_far_as_asked(sources):
    size = len(TEXTS["train"][0].encode())
    train, held_out = read(sources / "files", streaming=True, max_megabytes=10.5 * size / 1e6)
    assert texts(train) == TEXTS["train"][:10]
    # One document at least; a twentieth of the text is less.
    assert texts(held_out) == TEXTS["validation"][:1]


def test_splits_by_choice(sources):
    train, held_out = read(sources / "saved", split="train+validation")
    assert texts(train) == TEXTS["train"] + TEXTS["validation"]
    assert held_out is None
    assert read(sources / "saved", held_out="test")[1] is None


def test_one_of_several_configurations(tmp_path):
    names = ("first", "second")
    listed = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in names)
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{listed}---\n")
    for name in names:
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{name}"}}\n')
    assert texts(read(tmp_path, configuration="second")[0]) == ["second"]
    with pytest.raises(DataError, match=r"\['first', 'second'\].*--data.configuration"):
        read(tmp_path)


def test_documents_without_text_are_left_out(tmp_path):
    datasets.Dataset.from_dict({"body": ["a", None, "", "b"]}).save_to_disk(tmp_path / "gaps")
    train, _ = read(tmp_path / "gaps", field="body")
    assert [(document.name, document.text) for document in train] == [("train/0", b"a"), ("train/3", b"b")]


def test_a_corpus_of_it(sources):
    """With its own held-out split, and where it has none by the hash of names, streamed or not."""
    config = lambda name, **options: DataConfig(source=f"hf:{sources / name}", **options)
    load = lambda name, **options: load_corpus(config(name, **options), ByteTokenizer(), 64)
    corpus = load("saved")
    assert (corpus.train.documents, corpus.held_out.documents) == (30, 30)
    assert ByteTokenizer().decode(corpus.held_out.tokens.tolist()) == "".join(TEXTS["validation"])
    hashed = load("alone")
    assert hashed.train.documents + hashed.held_out.documents == 30
    assert 1 <= hashed.held_out.documents <= 6
    assert hashed.fingerprint == load("train.jsonl", streaming=True).fingerprint != corpus.fingerprint


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("saved", {"split": "training"}, "no split 'training' for --data.split; it has: train, validation"),
        ("files", {"split": "dev", "streaming": True}, "no split 'dev' for --data.split; it has: train, validation"),
        ("alone", {"field": "body"}, "no field 'body' for --data.field; it has: id, text"),
        ("train.jsonl", {"field": "body", "streaming": True}, "no field 'body' for --data.field; it has: id, text"),
        ("alone", {"field": "id"}, "field 'id' of train, row 0: expected text, got int"),
        ("bad.jsonl", {}, "cannot be read: "),
        ("bad.parquet", {"streaming": True}, "cannot be read: "),
        ("nowhere.parquet", {}, "cannot be read: .*nowhere.parquet"),
        ("empty.jsonl", {}, "no text in field 'text' of split train"),
    ],
)
def test_bad_data_sets(sources, name, options, message):
    for bad in ("bad.jsonl", "bad.parquet"):
        (sources / bad).write_bytes(b"neither json nor parquet\n")
    (sources / "empty.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match=message) as caught:
        read(sources / name, **options)
    assert str(caught.value).startswith(f"hf:{sources / name}: ")
    assert "\n" not in str(caught.value)


def test_no_such_data_set():
    with pytest.raises(DataError, match=r"hf:nobody/nothing: cannot be read: .*nobody/nothing"):
        read("nobody/nothing")


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="hf:any: needs the package datasets: pip install"):
        read("any")
