"""The tables of README.md and docs/ are those of the results, and break-even is where time shares cross."""

import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tables(benchmark_module):
    return benchmark_module("tables")


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


def test_a_table_without_results_is_named(tables, monkeypatch):
    made = {name: table for name, table in tables.tables().items() if name != "seeds"}
    monkeypatch.setattr(tables, "tables", lambda: made)
    with pytest.raises(ValueError, match=r"README\.md has a table 'seeds' of which there are no results"):
        tables.in_page("README.md", (ROOT / "README.md").read_text())


def test_sources_name_once_what_differs(tables):
    first = {"device": "1 x a GPU", "jax": "0.0", "commit": "0123456789", "command": "python x.py --option"}
    assert tables.source(first, first) == "`python x.py` on a GPU, jax 0.0, commit 0123456"
    others = (first | {"commit": "abcdefghij"}, first | {"device": "2 x a GPU", "jax": "0.1", "commit": None})
    expected = "`python x.py` on a GPU and 2 x a GPU, jax 0.0 and 0.1, commits 0123456, abcdefg"
    assert tables.source(first, *others) == expected
    cpu = first | {"device": "1 x cpu", "processor": "a CPU", "cores": 2, "commit": None}
    assert tables.source(cpu) == "`python x.py` on a CPU, 2 cores, jax 0.0, no commit"


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
