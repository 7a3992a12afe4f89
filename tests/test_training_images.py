"""Images as sequences: the files, one row an image, exact counts, a run end to end, and pictures of what it draws."""

import gzip
import lzma
import struct

import jax
import matplotlib.image
import numpy as np
import pytest

import train
from models import draw, generate
from models.sampler import Sampler
from tests.test_generate import MIX, make
from training.batches import Batches, evaluation_batches
from training.bpe import main as bpe
from training.cli import parse
from training.config import BatchConfig, DataConfig
from training.data import load_corpus
from training.errors import ConfigError, DataError
from training.evaluation import unigram
from training.metrics import read_metrics
from training.mnist import read_images, read_mnist
from training.pictures import draw_images, evenly, sheet
from training.png import write_png
from training.single_rows import SingleRows
from training.tokens import ByteTokenizer

BYTES = ByteTokenizer()
ROWS, COLUMNS = 4, 5
PIXELS = ROWS * COLUMNS
TRAIN, TEST = "train-images-idx3-ubyte", "t10k-images-idx3-ubyte"
TINY = [
    *("mnist", "--length", str(PIXELS), "--batch-size", "4", "--model.layers", "1", "--model.width", "16"),
    *("--model.heads", "2", "--buckets", "2", "--model.dtype", "float32", "--log-every", "1"),
]


def idx(images):
    return struct.pack(">4I", 0x803, *images.shape) + images.tobytes()


def some_images(count, seed):
    return np.random.default_rng(seed).integers(0, 256, (count, ROWS, COLUMNS), np.uint8)


IMAGES, TEST_IMAGES = some_images(25, 0), some_images(7, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    (root / "mnist").mkdir()
    (root / "mnist" / f"{TRAIN}.xz").write_bytes(lzma.compress(idx(IMAGES)))
    (root / "mnist" / f"{TEST}.gz").write_bytes(gzip.compress(idx(TEST_IMAGES)))
    return root


def settings(folder, **changes):
    return DataConfig(**{"source": "mnist", "packing": "single", "folder": folder} | changes)


def test_parts(folder, tmp_path):
    train, valid = read_mnist(settings(folder))
    np.testing.assert_array_equal(np.concatenate([train, valid]), IMAGES)
    assert len(valid) == 2
    test = read_mnist(settings(folder, held_out="test"))
    np.testing.assert_array_equal(test.train, train)
    np.testing.assert_array_equal(test.held_out, TEST_IMAGES)
    # As they are, and without a folder of their own.
    (tmp_path / TRAIN).write_bytes(idx(IMAGES))
    np.testing.assert_array_equal(read_mnist(settings(tmp_path)).train, train)
    with pytest.raises(DataError, match=f"mnist: no mnist/{TEST}.xz in .*--data-dir"):
        read_mnist(settings(tmp_path, held_out="test"))
    (tmp_path / TEST).write_bytes(idx(TEST_IMAGES.reshape(7, 2, 10)))
    with pytest.raises(DataError, match=r"images of 2 x 10 pixels, where those to train on have 4 x 5"):
        read_mnist(settings(tmp_path, held_out="test"))


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "begins with nothing, not with 00 00 08 03"),
        (struct.pack(">2I", 0x801, 7) + bytes(7), "not an idx file of images: it begins with 00 00 08 01"),
        (idx(IMAGES)[:12], "cut off after 12 bytes"),
        (idx(IMAGES)[:-1], "damaged: 25 images of 4 x 5 pixels take 516 bytes, it has 515"),
        (idx(IMAGES) + b"x", "take 516 bytes, it has 517"),
        (idx(IMAGES[:0]), "no images in it"),
    ],
)
def test_damaged_files(tmp_path, contents, message):
    (tmp_path / TRAIN).write_bytes(contents)
    with pytest.raises(DataError, match=message):
        read_images(tmp_path / TRAIN)
    (tmp_path / f"{TRAIN}.xz").write_bytes(lzma.compress(idx(IMAGES))[:-9])
    with pytest.raises(DataError, match="cannot be read"):
        read_images(tmp_path / f"{TRAIN}.xz")


def test_an_image_is_a_row(folder):
    corpus = load_corpus(settings(folder), BYTES, PIXELS)
    assert corpus.image_shape == (ROWS, COLUMNS)
    rows = SingleRows.of(corpus.train.tokens, PIXELS)
    assert len(rows) == 23
    for number, image in enumerate(IMAGES[:23]):
        np.testing.assert_array_equal(rows[number], [BYTES.end, *image.ravel()])
    np.testing.assert_array_equal(corpus.train.tokens[rows.targets(22)], IMAGES[22].ravel())
    for length in (PIXELS - 1, PIXELS + 1):
        with pytest.raises(DataError, match=rf"as --length, {length}; they have 20: take --length 20"):
            load_corpus(settings(folder), BYTES, length)
    uneven = np.asarray([1, 2, 9, 1, 9, 1, 2, 9])
    with pytest.raises(DataError, match=r"they have 1 to 2: take --data.packing documents"):
        SingleRows.of(uneven, 2)


def test_an_epoch_takes_each_image_once(folder):
    corpus = load_corpus(settings(folder), BYTES, PIXELS)
    batches = Batches(corpus.train.tokens, BatchConfig(length=PIXELS, size=1), seed=0, packing="single")
    first, second = (np.stack([batches.at(23 * epoch + step)[0, 0] for step in range(23)]) for epoch in range(2))
    assert np.all(first[:, 0] == BYTES.end)
    assert np.any(first != second)
    for epoch in (first, second):
        drawn = {row.tobytes() for row in epoch[:, 1:].astype(np.uint8)}
        assert drawn == {image.tobytes() for image in IMAGES[:23]}


def test_evaluation_counts_each_pixel_once_and_nothing_else(folder):
    corpus = load_corpus(settings(folder, held_out="test"), BYTES, PIXELS)
    batches = list(evaluation_batches(corpus.held_out, 3, PIXELS, 0, "single"))
    assert [batch.tokens.shape for batch in batches] == [(3, PIXELS + 1)] * 3
    counted = np.concatenate([batch.tokens[:, 1:][batch.weights > 0] for batch in batches])
    np.testing.assert_array_equal(counted, TEST_IMAGES.ravel())
    assert sum(batch.num_bytes for batch in batches) == sum(batch.weights.sum() for batch in batches) == 7 * PIXELS
    baseline = unigram(corpus.train, BYTES.vocab_size, batches)
    assert baseline.bits_per_byte == pytest.approx(baseline.loss / np.log(2), rel=1e-12)
    (some,) = evaluation_batches(corpus.held_out, 4, PIXELS, 2, "single")
    np.testing.assert_array_equal(some.tokens[some.weights[:, 0] > 0][:, 1:], TEST_IMAGES[[0, 6]].reshape(2, -1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "mnist"], r"--data mnist: each image is a sequence; take the preset mnist.*got .* stream"),
        (["mnist", "--tokenizer", "t.json"], "--data mnist is pixels, and no text for --tokenizer t.json"),
        (["mnist", "--data.separate-documents"], "--data.separate-documents: --data.packing single has one document"),
        (["mnist", "--evaluation.lengths", "28"], "--evaluation.lengths: --data.packing single has sequences of one"),
    ],
)
def test_contradictions(options, message):
    with pytest.raises(ConfigError, match=message):
        parse(options)


def test_preset():
    config = parse(["mnist", "--attention", "dense", "--data.held-out", "test"])
    assert (config.batch.length, config.evaluation.final_windows, config.data.images) == (784, 0, True)


def test_pixels_are_the_likeliest_of_a_forward_pass():
    """All of them, the last included, with no more positions than pixels; and those that are given stay."""
    model = make(MIX, positions="learned", max_length=PIXELS)
    begun = np.random.default_rng(0).integers(0, 49, (2, 7)).astype(np.uint8)
    keys = {"key": jax.random.key(0), "pattern_key": jax.random.key(1)}
    options = {"begin_token": 49, "sampler": Sampler(0.0), **keys}
    images = draw_images(model, begun, (ROWS, COLUMNS), **options)
    assert (images.shape, images.dtype) == ((2, ROWS, COLUMNS), np.uint8)
    pixels = images.reshape(2, PIXELS).astype(np.int32)
    np.testing.assert_array_equal(pixels[:, :7], begun)
    rows = np.concatenate([np.full((2, 1), 49, np.int32), pixels], axis=1)
    scores = np.asarray(jax.jit(lambda tokens: model(tokens, key=keys["pattern_key"]))(rows[:, :-1]))[:, :, :50]
    np.testing.assert_array_equal(pixels[:, 7:], np.argmax(scores, axis=-1)[:, 7:])
    some = draw_images(model, begun, (ROWS, COLUMNS), count=3, **options).reshape(2, PIXELS)
    np.testing.assert_array_equal(some, np.where(np.arange(PIXELS) < 10, pixels, 0))


def test_a_sheet_is_read_back_from_its_file(tmp_path):
    path = tmp_path / "sheet.png"
    picture = sheet([TEST_IMAGES[:3], TEST_IMAGES[3:5]])
    write_png(path, picture)
    read = np.rint(255 * matplotlib.image.imread(path)).astype(np.uint8)
    np.testing.assert_array_equal(read, picture)
    small = picture[::3, ::3]
    assert small.shape == (2 * ROWS + 3 * 2, 3 * COLUMNS + 4 * 2)
    for number, (down, across) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]):
        top, left = 2 + down * (ROWS + 2), 2 + across * (COLUMNS + 2)
        np.testing.assert_array_equal(small[top : top + ROWS, left : left + COLUMNS], TEST_IMAGES[number])
    assert np.unique(small[2 + ROWS :, 2 + 2 * (COLUMNS + 2) :]).size == 1


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A whole small run, in this process."""
    out = tmp_path_factory.mktemp("finished") / "run"
    options = ("--data-dir", str(folder), "--data.held-out", "test", "--out", str(out), "-n", "3")
    sample = ("--sample.prompt", "8", "--sample.tokens", "12", "--evaluation.every", "2", "--evaluation.windows", "4")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert train.main([*TINY, *options, *sample]) == 0
    return out


def test_a_run_trains_and_draws(run):
    records = read_metrics(run / "metrics.jsonl")
    assert [record["kind"] for record in records] == ["train", "train", "evaluation", "train", "final", "sample", "end"]
    final = records[4]
    assert final["bits_per_byte"] == pytest.approx(final["loss"] / np.log(2), rel=1e-12)
    # It has barely learned: of 257 tokens, padded to 320.
    assert np.log(200) < final["loss"] < np.log(400)
    picture = np.rint(255 * matplotlib.image.imread(run / "sample.png")).astype(np.uint8)
    originals, completed = (
        picture[3 * top : 3 * (top + ROWS) : 3, 6 : 6 + 3 * COLUMNS : 3] for top in (2, 2 + ROWS + 2)
    )
    np.testing.assert_array_equal(originals, TEST_IMAGES[0])
    np.testing.assert_array_equal(completed.ravel()[:8], TEST_IMAGES[0].ravel()[:8])
    assert np.any(completed != originals)


def test_images_are_drawn_by_a_checkpoint(run, tmp_path, capsys):
    out = tmp_path / "images.png"
    options = ["--count", "12", "--completions", "3", "--out", str(out), "--seed", "1"]
    assert draw.main([str(run), *options]) == 0
    assert f"{out}: 12 images by {run / 'checkpoints' / '3'}" in capsys.readouterr().out
    first = out.read_bytes()
    picture = np.rint(255 * matplotlib.image.imread(out)).astype(np.uint8)[::3, ::3]
    assert picture.shape == (5 * (ROWS + 2) + 2, 10 * (COLUMNS + 2) + 2)
    line = lambda number: picture[2 + number * (ROWS + 2) :][:ROWS]
    of_three = [2 + (COLUMNS + 2) * number for number in range(3)]
    for left, image in zip(of_three, TEST_IMAGES[evenly(3, 7)], strict=True):
        original, half, completed = (line(number)[:, left : left + COLUMNS] for number in (2, 3, 4))
        np.testing.assert_array_equal(original, image)
        np.testing.assert_array_equal(half[:2], image[:2])
        assert not half[2:].any()
        np.testing.assert_array_equal(completed[:2], image[:2])
        assert np.any(completed[2:] != image[2:])
    assert draw.main([str(run), *options]) == 0
    assert out.read_bytes() == first
    assert draw.main([str(run), *options[:-1], "2", "--completions", "0"]) == 0
    assert len(matplotlib.image.imread(out)) == 3 * (2 * (ROWS + 2) + 2)


def test_commands_say_what_does_not_fit(run, folder, tmp_path, capsys):
    def said(main, *options):
        assert main([str(option) for option in options]) == 2
        shown = capsys.readouterr().err
        assert shown.count("\n") == 1
        return shown

    assert "has learned images, and no text: python -m models.draw" in said(generate.main, run, "--prompt", "a")
    assert "--count must be at least 1, got 0" in said(draw.main, run, "--count", "0")
    assert "--temperature must be at least 0" in said(draw.main, run, "--temperature", "-1")
    assert "no run in nowhere" in said(draw.main, "nowhere")
    assert "mnist: no mnist/train-images-idx3-ubyte.xz" in said(draw.main, run, "--data-dir", tmp_path)
    assert "its documents are images, and no text" in said(
        bpe, tmp_path / "t.json", "--data.source", "mnist", "--data.folder", folder
    )
    (tmp_path / TRAIN).write_bytes(idx(some_images(30, 2)[:, :3]))
    (tmp_path / TEST).write_bytes(idx(some_images(30, 2)[:, :3]))
    assert "has learned images of 20 pixels, these have 15" in said(draw.main, run, "--data-dir", tmp_path)
