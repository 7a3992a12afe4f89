"""Packed documents: each token once, no row overfull, and the losses of the documents taken apart."""

import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train
from models.documents import document_ids
from models.transformer import TransformerConfig
from sparse_flash_jax.flax.pattern import Dense, Hash
from tests.test_train_cli import TINY, losses
from tests.test_training_data import stream_of
from training.batches import Batches, evaluation_batches
from training.config import BatchConfig, OptimizerConfig
from training.data import Stream
from training.metrics import read_metrics
from training.optimizer import make_optimizer
from training.packing import PackedRows, best_fit, unpack
from training.step import init_state, make_evaluation_step, make_train_step


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax raises a float to an integer power, which the strict rules forbid."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def plain_best_fit(sizes, capacity):
    """How much each row holds: one piece after the other, as the algorithm is told in textbooks."""
    rooms = []
    for size in sorted(sizes, reverse=True):
        fits = [(room, row) for row, room in enumerate(rooms) if room >= size]
        if fits:
            rooms[min(fits)[1]] -= size
        else:
            rooms.append(capacity - size)
    return sorted(capacity - room for room in rooms)


@pytest.mark.parametrize("capacity", [7, 50, 1000])
def test_best_fit_decreasing(capacity):
    sizes = np.random.default_rng(capacity).integers(1, capacity + 1, 300)
    sizes[::2] = sizes[::2] // 5 + 1
    row, offset = best_fit(sizes, capacity)
    assert sorted(np.bincount(row, sizes).astype(int)) == plain_best_fit(sizes.tolist(), capacity)
    for number in range(row.max() + 1):
        order = np.argsort(offset[row == number])
        ends = np.cumsum(sizes[row == number][order])
        np.testing.assert_array_equal(offset[row == number][order], np.concatenate([[0], ends[:-1]]))
        assert ends[-1] <= capacity


@pytest.mark.parametrize("length", [8, 16, 61, 200])
def test_each_token_is_a_target_once_and_follows_its_own(length):
    tokens = stream_of([5, 1, 40, 3, 17, 9, 60, 2, 16, 8, 61])
    rows = PackedRows.of(tokens, length)
    pairs = []
    for row in rows:
        assert row.shape == (length + 1,)
        known, segments, weights = (np.asarray(x)[0] for x in unpack(row[None]))
        pairs += [(known[place], known[place + 1]) for place in np.flatnonzero(weights)]
        # What sees each other stands in the text one after the other.
        for segment in np.unique(segments):
            within = known[:-1][segments == segment]
            assert np.all(np.diff(within[within > 0]) == 1)
    assert sorted(pairs) == sorted(zip([0, *tokens[:-1]], tokens, strict=True))
    assert rows.filled == len(tokens) / (len(rows) * length)


def test_an_epoch_takes_each_row_once_in_an_order_of_its_own():
    tokens = stream_of([5, 40, 3, 17, 9, 60] * 8)
    rows = PackedRows.of(tokens, 16)
    orders = []
    for seed in (0, 1):
        batches = Batches(tokens, BatchConfig(length=16, size=1), seed, packing="documents")
        for epoch in (0, 1):
            taken = [batches.at(epoch * len(rows) + place).tobytes() for place in range(len(rows))]
            assert sorted(taken) == sorted(row.tobytes() for row in rows)
            orders.append(tuple(taken))
    assert len(set(orders)) == 4


def test_many_documents_are_packed_in_seconds_and_closely():
    """100,000 documents with the long tail of real ones: 0.3 s on a core, 0.999 filled."""
    lengths = np.random.default_rng(0).lognormal(6.0, 1.2, 100_000).astype(int) + 1
    tokens = np.ones(lengths.sum(), np.uint16)
    tokens[np.cumsum(lengths) - 1] = 0
    begun = time.process_time()
    rows = PackedRows.of(tokens, 4096)
    assert time.process_time() - begun < 15
    assert rows.filled > 0.99


DENSE = TransformerConfig(vocab_size=20, num_layers=1, width=32, num_heads=2, positions="rope", attention=Dense())


def text_of(lengths, seed=0):
    tokens = np.random.default_rng(seed).integers(1, 20, sum(lengths)).astype(np.uint16)
    tokens[np.cumsum(lengths) - 1] = 0
    return tokens


def test_the_loss_of_a_row_is_that_of_its_documents():
    lengths = [3, 9, 6, 4]
    tokens = text_of(lengths)
    structure, state = init_state(DENSE, make_optimizer(OptimizerConfig(), 10), seed=0)
    evaluation_step = make_evaluation_step(structure, 0, 0, packed=True)
    counts = np.ones((1, 27), np.float32)
    loss = lambda rows: float(evaluation_step(state.params, rows, counts * (rows[:, 1:] >= 0)))
    rows = PackedRows.of(tokens, 27)
    assert len(rows) == 1
    apart = [loss(PackedRows.of(document, 27)[0][None]) for document in np.split(tokens, np.cumsum(lengths)[:-1])]
    # float32 sums of 22 losses, and rotations by other angles: 6e-8 was measured.
    assert loss(rows[0][None]) == pytest.approx(sum(apart), rel=1e-6)
    joined = np.concatenate([[0], tokens])[None].astype(np.int32)
    joined = np.pad(joined, ((0, 0), (0, 28 - joined.shape[1])))
    assert loss(joined) != pytest.approx(sum(apart), rel=1e-3)


def test_hash_and_local_layers_learn_from_packed_rows():
    config = TransformerConfig(
        vocab_size=20, num_layers=2, width=32, num_heads=2, positions="rope", attention=(Dense(window=4), Hash(4))
    )
    text = np.tile(np.arange(1, 13), 30)
    stops = np.cumsum(np.random.default_rng(0).integers(5, 40, 12))
    tokens = text[: stops[-1]].astype(np.uint16)
    tokens[stops - 1] = 0
    batches = Batches(tokens, BatchConfig(length=32, size=2, accumulation=2), 0, packing="documents")
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2), 40)
    structure, state = init_state(config, optimizer, seed=0)
    step = make_train_step(structure, optimizer, 0, None, packed=True)
    loss = lambda *micro_batches: float(step(jax.tree.map(jnp.copy, state), np.stack(micro_batches))[1].loss)

    # The loss of a step is the mean over its targets: micro-batches with fewer of them weigh less.
    first, second = batches.at(0)
    second[:, 9:] = padding = ~0
    nothing = np.full_like(first, padding)
    first_count, second_count = ((rows[:, 1:] >= 0).sum() for rows in (first, second))
    assert 0 < second_count < first_count
    total = first_count * loss(first, nothing) + second_count * loss(nothing, second)
    assert loss(first, second) == pytest.approx(total / (first_count + second_count), rel=1e-6)

    losses = []
    for number in range(40):
        state, metrics = step(state, batches.at(number))
        losses.append(float(metrics.loss))
    assert losses[0] > 2.5
    assert losses[-1] < 1.0


def test_a_run_on_packed_documents_goes_on_as_if_unbroken(tmp_path, capsys):
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / "text" / str(number)).write_text(f"document {number}: the same words again\n" * (number % 7 + 1))
    options = [*TINY, "--data", str(tmp_path / "text"), "--data.packing", "documents", "-n", "4"]
    options += ["--checkpoint.every", "2", "--sample.prompt", "60"]
    whole, branch = tmp_path / "whole", tmp_path / "branch"
    with jax.numpy_rank_promotion("allow"):
        assert train.main([*options, "--out", str(whole), "--sample.tokens", "3"]) == 0
        assert train.main([*options, "--out", str(branch), "--resume", str(whole / "checkpoints" / "2")]) == 0
    assert re.search(r"documents packed into \d+ sequences, \d+\.\d% filled", capsys.readouterr().out)
    assert losses(branch) == losses(whole)[2:]
    first, second = (read_metrics(out / "metrics.jsonl") for out in (whole, branch))
    final = lambda records: [record["loss"] for record in records if record["kind"] == "final"]
    assert final(first) == final(second)
    assert train.main([*options, "--out", str(whole), "--resume", "--data.packing", "stream"]) == 2
    assert "data.packing was 'documents', now 'stream'" in capsys.readouterr().err


def test_evaluation_of_packed_documents_counts_each_target_once():
    tokens = stream_of([5, 40, 3, 17, 9, 60])
    stream = Stream(tokens, np.arange(len(tokens), dtype=np.int32), 6)
    batches = list(evaluation_batches(stream, 2, 16, 0, "documents"))
    seen = np.concatenate([batch.tokens[:, 1:][batch.weights > 0] for batch in batches])
    np.testing.assert_array_equal(np.sort(seen), np.sort(tokens))
    assert sum(batch.num_bytes for batch in batches) == stream.byte_counts.sum()
    for batch in batches:
        # In this text a token stands for as many bytes as its own number less one; ends are told by their places.
        counted = batch.tokens[:, 1:][batch.weights > 0]
        assert batch.num_bytes >= (counted[counted > 0] - 1).sum()


def test_an_end_token_begins_the_next_document_where_they_are_packed():
    tokens = jnp.asarray([[1, 9, 2, 3, 9, 9, 4]], jnp.int32)
    np.testing.assert_array_equal(document_ids(tokens, 9, packed=True), [[0, 1, 1, 1, 2, 3, 3]])
