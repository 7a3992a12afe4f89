"""Splits, streams and batches: who is held out, and which tokens a step sees."""

import contextlib
import lzma
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from training.batches import Batches, Shard, evaluation_batches
from training.checkpoint import Checkpoints, restore
from training.config import BatchConfig, DataConfig, TrainConfig, identity, with_defaults
from training.data import Stream, load_corpus, split_documents
from training.errors import CheckpointError, ConfigError, DataError
from training.python_source import python_documents
from training.sources import Document
from training.step import TrainState
from training.tokens import ByteTokenizer

BYTES = ByteTokenizer()


def documents(count):
    return [Document(f"folder/{index}.txt", f"text {index}".encode()) for index in range(count)]


def stream_of(lengths, end=0):
    """A stream of documents of so many tokens, the end included: all different but the ends."""
    tokens = np.arange(1, sum(lengths) + 1, dtype=np.int32)
    tokens[np.cumsum(lengths) - 1] = end
    return tokens


def test_split_by_name_is_stable_and_complete():
    everything = documents(400)
    train, held_out = split_documents(everything, "valid")
    assert sorted(train + held_out) == sorted(everything)
    assert 5 <= len(held_out) <= 40
    # A document's part does not depend on its neighbours, but for the two extremes.
    assert len(set(split_documents(everything[:200], "valid")[1]) - set(held_out)) <= 1


@pytest.mark.parametrize("count", [2, 3, 10])
def test_no_part_is_empty(count):
    train, held_out = split_documents(documents(count), "valid")
    assert train
    assert held_out


def test_one_document_keeps_its_tail_whole():
    text = "äöü".encode() * 1000
    (train,), (held_out,) = split_documents([Document("a", text)], "valid")
    assert train.text + held_out.text == text
    assert 0 < len(held_out.text) < len(text) / 10
    train.text.decode()


def test_split_by_folder():
    named = [Document(f"set/{part}/{i}", b"x") for part in ("train", "valid", "test") for i in range(2)]
    train, held_out = split_documents([Document("set/README", b"no"), *named], "test")
    assert [document.name for document in train] == ["set/train/0", "set/train/1"]
    assert [document.name for document in held_out] == ["set/test/0", "set/test/1"]


@pytest.mark.parametrize(
    ("parts", "held_out", "way_out"),
    [
        (("train", "test"), "valid", "add --data.held-out test"),
        (("train", "valid"), "test", "add --data.held-out valid"),
        (("train", "dev"), "valid", "name train/ itself"),
    ],
)
def test_held_out_folder_under_another_name_is_not_trained_on(parts, held_out, way_out):
    named = [Document(f"{part}/{i}", b"x") for part in parts for i in range(3)]
    with pytest.raises(DataError, match=f"has train/ but no {held_out}/; .*{way_out}"):
        split_documents(named, held_out)


def test_python_source_is_bounded_and_repeatable():
    first, second = python_documents(300_000), python_documents(300_000)
    assert first == second
    assert 100_000 < sum(len(document.text) for document in first) <= 300_000
    assert all(document.name.endswith(".py") for document in first)


def test_named_sets_in_a_data_folder(tmp_path, monkeypatch):
    (tmp_path / "enwik8.xz").write_bytes(lzma.compress(bytes(100_000_000), preset=0))
    monkeypatch.setenv("SPARSE_FLASH_DATA", str(tmp_path))
    train, held_out = load_named("enwik8")
    assert (len(train), len(held_out)) == (90_000_001, 5_000_001)
    with pytest.raises(DataError, match=r"eltec: no eltec_eng.tar.xz in .*SPARSE_FLASH_DATA"):
        load_named("eltec")


def load_named(source):
    corpus = load_corpus(DataConfig(source=source), BYTES, 16)
    return corpus.train.tokens, corpus.held_out.tokens


def test_too_little_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("too short " * 20)
    with pytest.raises(DataError, match=r"training text has 191 tokens, too few for a sequence of 500"):
        load_corpus(DataConfig(source=str(path)), BYTES, 500)


def test_stream_ends_each_document(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text(name * 30)
    corpus = load_corpus(DataConfig(source=str(tmp_path)), BYTES, 8)
    both = np.concatenate([corpus.train.tokens, corpus.held_out.tokens])
    assert np.count_nonzero(both == BYTES.end) == 3
    assert corpus.train.byte_counts.sum() + corpus.held_out.byte_counts.sum() == 90
    again = load_corpus(DataConfig(source=str(tmp_path)), BYTES, 8)
    assert again.fingerprint == corpus.fingerprint
    (tmp_path / "a").write_text("a" * 29 + "z")
    assert load_corpus(DataConfig(source=str(tmp_path)), BYTES, 8).fingerprint != corpus.fingerprint


@pytest.mark.parametrize("changed", ["text", "tokenizer"])
def test_a_run_does_not_go_on_with_other_text(tmp_path, changed):
    """The file of a run is edited in place: its checkpoints say so, and are good again when the edit is undone."""
    path = tmp_path / "text.txt"
    path.write_text("the text of a run\n" * 50)
    config = TrainConfig(data=DataConfig(source=str(path)))
    belongs_to = lambda tokenizer: identity(config) | {"text": load_corpus(config.data, tokenizer, 16).fingerprint}
    state = TrainState(jnp.ones((), jnp.int32), nnx.State({}), ())
    with Checkpoints(tmp_path / "checkpoints", 1, belongs_to(BYTES)) as checkpoints:
        checkpoints.save(state, 1)
    before, tokenizer = path.read_text(), BYTES
    if changed == "text":
        path.write_text(before.replace("run", "fun", 1))
    else:
        tokenizer = ByteTokenizer()
        tokenizer.fingerprint = "other"
    checkpoint = tmp_path / "checkpoints" / "1"
    with pytest.raises(CheckpointError, match=r"text was .*, now .*the text has changed, or its tokens: name the same"):
        restore(checkpoint, state, belongs_to(tokenizer))
    path.write_text(before)
    assert int(restore(checkpoint, state, belongs_to(BYTES)).step) == 1


def test_what_belongs_to_a_run():
    """How sequences are filled; of where the text is, nothing: its fingerprint says what it is."""
    changed = lambda **options: identity(TrainConfig(data=DataConfig(**options)))
    moved = changed(source="hf:a", configuration="b", split="c", field="d", streaming=True, max_megabytes=1.0)
    assert moved == identity(TrainConfig())
    assert changed(packing="documents") != moved
    older = {name: value for name, value in moved.items() if name != "data.packing"}
    assert with_defaults(older) == moved


def test_batches_are_a_function_of_seed_and_step():
    tokens = np.arange(1000, dtype=np.uint16)
    shape = BatchConfig(length=16, size=2, accumulation=3)
    batches = Batches(tokens, shape, seed=0)
    batch = batches.at(5)
    assert (batch.shape, batch.dtype) == ((3, 2, 17), np.int32)
    np.testing.assert_array_equal(np.diff(batch, axis=-1), 1)
    np.testing.assert_array_equal(batch, Batches(tokens, shape, seed=0).at(5))
    assert np.any(batch != Batches(tokens, shape, seed=1).at(5))


def test_rows_are_those_of_older_runs():
    """A run that began under an earlier version goes on with the tokens that it would have had."""
    batches = Batches(np.arange(1000, dtype=np.uint16), BatchConfig(length=16, size=2, accumulation=2), seed=3)
    first = [batches.at(step)[..., 0].ravel().tolist() for step in (0, 15, 16, 1000)]
    assert first == [[356, 852, 820, 868], [52, 83, 515, 339], [531, 403, 787, 67], [419, 835, 659, 403]]


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_processes_read_parts_of_the_same_batch(packing):
    tokens = stream_of([5, 40, 3, 17, 9, 60] * 4)
    whole, *parts = (
        Batches(tokens, BatchConfig(length=16, size=4, accumulation=2), 0, Shard(index, count), packing)
        for index, count in ((0, 1), (0, 2), (1, 2))
    )
    for step in (0, 3, 50):
        np.testing.assert_array_equal(np.concatenate([part.at(step) for part in parts], axis=1), whole.at(step))


@pytest.mark.parametrize(
    ("shard", "message"), [((0, 3), "--batch-size 4 must be a multiple .* 3"), ((2, 2), r"\[0, 2\), got 2")]
)
def test_parts_that_are_not_equal(shard, message):
    with pytest.raises(ConfigError, match=message):
        Batches(np.arange(100), BatchConfig(length=16, size=4), 0, Shard(*shard))


def test_batches_are_read_ahead_until_closed():
    batches = Batches(np.arange(1000, dtype=np.uint16), BatchConfig(length=16, size=2), seed=0)
    with contextlib.closing(batches.from_step(60)) as coming:
        for step in range(60, 70):
            np.testing.assert_array_equal(next(coming), batches.at(step))
        assert reading_threads()
    deadline = time.monotonic() + 30
    while reading_threads():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def reading_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("grain")]


def test_an_epoch_takes_each_window_once():
    tokens = np.arange(16 * 20 + 1, dtype=np.uint16)
    batches = Batches(tokens, BatchConfig(length=16, size=1), seed=0)
    windows = (len(tokens) - 16) // 16
    for epoch in range(2):
        starts = sorted(int(batches.at(step)[0, 0, 0]) for step in range(epoch * windows, (epoch + 1) * windows))
        np.testing.assert_array_equal(np.diff(starts), 16)


@pytest.mark.parametrize("count", [17, 31, 48, 49, 63])
def test_every_token_is_learned_from(count):
    batches = Batches(np.arange(count, dtype=np.uint16), BatchConfig(length=16, size=1), seed=0)
    targets = {int(token) for step in range(1000) for token in batches.at(step)[0, 0, 1:]}
    assert targets == set(range(1, count))


def test_shortest_stream_has_a_batch():
    batch = Batches(np.arange(17, dtype=np.uint16), BatchConfig(length=16, size=2), seed=3).at(7)
    np.testing.assert_array_equal(batch[0, 0], np.arange(17))


def test_evaluation_counts_each_target_once():
    tokens = np.arange(1, 103, dtype=np.uint16)
    stream = Stream(tokens, np.full(102, 3, np.int32), 1)
    batches = list(evaluation_batches(stream, size=4, length=16, windows=0))
    seen = np.concatenate([batch.tokens[:, 1:][batch.weights > 0] for batch in batches])
    np.testing.assert_array_equal(np.sort(seen), tokens[1:])
    assert sum(batch.num_bytes for batch in batches) == 3 * 101
    assert len(list(evaluation_batches(stream, size=4, length=16, windows=3))) == 1
