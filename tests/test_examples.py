import pathlib
import re

import matplotlib.image
import numpy as np
import pytest

from examples.draw_masks import main, patterns, picture

ROOT = pathlib.Path(__file__).parents[1]
LENGTH, BLOCK = 24, 4


@pytest.fixture(scope="module")
def pictures():
    return [picture(*pattern, block=BLOCK) for pattern in patterns(LENGTH, seed=0, block=BLOCK)]


def test_every_pattern_is_drawn(pictures):
    assert [each.title for each in pictures] == [
        "causal",
        "sliding window",
        "QK-sparse",
        "hash-sparse",
        "hash-sparse, exclude_self",
        "packed",
        "packed, 2 buckets",
        "packed, window",
        "hash-sparse, bidirectional",
        "chunked",
        "dilated",
        "sinks_and_window",
        "sinks_and_window, packed",
        "prefix_lm",
        "union of a window, and what is far",
        "block_sparse",
        "intersection of blocks and a window",
        "block_top_k",
    ]


def test_tiles_cover_what_is_visible(pictures):
    for each in pictures:
        tiles = each.by_slot.reshape(LENGTH // BLOCK, BLOCK, LENGTH // BLOCK, BLOCK)
        seen, full = tiles.any(axis=(1, 3)), tiles.all(axis=(1, 3))
        assert not (seen & ~each.visited).any(), each.title
        assert not (each.full & ~full).any(), each.title
        assert each.by_slot.sum() == each.by_position.sum(), each.title
        assert each.visited.sum() < each.visited.size, each.title


def test_slots_are_a_reordering_of_positions(pictures):
    for each in pictures:
        for axis in (0, 1):
            by_position, by_slot = (np.sort(mask.sum(axis)) for mask in (each.by_position, each.by_slot))
            np.testing.assert_array_equal(by_position, by_slot, err_msg=each.title)


def test_text_shows_both_masks(pictures, capsys):
    main(["--length", str(LENGTH), "--block", str(BLOCK)])
    out = capsys.readouterr().out
    for each in pictures:
        assert f"{each.title}: {each.caption}" in out
    rows = [line for line in out.splitlines() if re.fullmatch(r"[█▓░ ·]+", line)]
    assert len(rows) == LENGTH * len(pictures)
    assert {len(row) for row in rows} == {4 * LENGTH + 4}


def test_figures_are_written(pictures, tmp_path):
    columns, opener, each = tmp_path / "columns.png", tmp_path / "opener.png", tmp_path / "each"
    sizes = ["--length", str(LENGTH), "--block", str(BLOCK)]
    main([*sizes, "--png", str(columns), "--opener", str(opener), "--each", str(each)])
    of_patterns = sorted(path.name for path in each.iterdir())
    assert len(of_patterns) == len(pictures)
    assert of_patterns == sorted(path.name for path in (ROOT / "docs" / "masks").iterdir())
    assert opener.stat().st_size < 150_000
    for path in (columns, opener):
        image = matplotlib.image.imread(path)
        assert min(image.shape[:2]) > 500
        assert image[..., :3].std() > 0.05
