"""The tables of README.md and docs/ are those of the results, and break-even is where time shares cross."""

import importlib
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tables():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module("tables")
    finally:
        sys.path.pop(0)


def test_pages_have_the_measured_tables(tables):
    for page in tables.PAGES:
        text = (ROOT / page).read_text()
        assert tables.in_page(page, text) == text, "write them anew with: python benchmarks/plot.py"


def test_pages_with_tables_are_known(tables):
    with_tables = [
        path for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")) if "<!-- table" in path.read_text()
    ]
    assert {path.relative_to(ROOT).as_posix() for path in with_tables} == set(tables.PAGES)


def test_a_page_without_markers_is_refused(tables):
    with pytest.raises(ValueError, match="<!-- table speed-up -->"):
        tables.in_page("README.md", "# A title\n")


@pytest.mark.parametrize(
    ("pairs", "dense", "expected"),
    [
        ([[0.1, 0.5], [0.4, 2.0]], 1.0, 0.2),  # half of the way, both in logarithms
        ([[0.1, 0.5], [0.4, 2.0]], 0.5, None),
        ([[0.1, 0.5], [0.4, 0.9]], 1.0, 1.0),
        ([[0.1, 1.5], [0.4, 0.9]], 1.0, None),  # noise at the sparse end: no promise
        ([[0.1, 0.5], [0.2, 0.5], [0.8, 1.0], [0.9, 0.9]], 1.0, 0.8),
    ],
)
def test_break_even(tables, pairs, dense, expected):
    assert tables.break_even(pairs, dense) == (expected if expected is None else pytest.approx(expected))
