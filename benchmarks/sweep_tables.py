"""The tables of what `sweeps.py` measured: speed-up by length and pattern, and beside what the paper reports."""

from pathlib import Path

from environment import source
from markdown_table import markdown, or_dash
from pattern_names import brief, words
from sweep_cases import HASHED, HEADS, MASKED, QK
from sweep_results import SWEEPS, Rows, load_rows, paper

BOTH = "forward_backward"


def sweep_tables(path: Path = SWEEPS) -> dict[str, str]:
    """Returns each table by the name in its markers; none where nothing has been measured."""
    if not path.exists():
        return {}
    environment, rows = load_rows(path)
    if not rows:
        return {}
    return {
        "sweeps": f"{_by_length(rows)}\n\n{source(environment)}.",
        "sweeps-others": f"{_beside_others(rows)}\n\n{source(environment)}.",
        "sweeps-paper": f"{_beside_paper(rows)}\n\n{source(environment)}; the paper's are {paper()['how']}.",
    }


def _by_length(rows: Rows) -> str:
    """Forward + backward over cuDNN's dense causal attention: a row a length, a column a pattern."""
    table = [["T", "cuDNN dense", *map(brief, HASHED + QK)]]
    for length in sorted(length for method, _, heads, length in rows if (method, heads) == ("dense", max(HEADS))):
        dense = _ms(rows, "dense", "causal", length)
        speedups = [_over(dense, _ms(rows, "sparse", pattern, length)) for pattern in HASHED + QK]
        table.append([str(length), or_dash(dense, "{:.2f} ms"), *(or_dash(x, "{:.1f}x") for x in speedups)])
    return markdown(table)


def _beside_others(rows: Rows) -> str:
    """Forward + backward with fewer heads: milliseconds of dense, ours, a mask of T x T, and FlexAttention."""
    methods = {"sparse": "ours", "naive": "mask of T x T, XLA", "naive_cudnn": "mask of T x T, cuDNN"}
    table = [["T", "", "cuDNN dense", *methods.values(), "FlexAttention", "making its mask"]]
    shown = [(length, pattern) for _, pattern, heads, length in rows if heads == min(HEADS) and pattern in MASKED]
    for length, pattern in sorted(set(shown)):
        dense = _ms(rows, "dense", "causal", length, min(HEADS))
        times = [_ms(rows, method, pattern, length, min(HEADS)) for method in (*methods, "flex")]
        mask = rows.get(("flex", pattern, min(HEADS), length), {}).get("mask")
        table.append([str(length), words(pattern), *(or_dash(ms, "{:.2f}") for ms in (dense, *times, mask))])
    return markdown(table)


def _beside_paper(rows: Rows) -> str:
    """At the paper's shape, forward + backward: milliseconds, and over each one's own dense attention."""
    measured = paper()
    length, paper_ms = measured["length"], measured["forward_backward_ms"]
    device = measured["device"]
    columns = ["ours, ms", "over cuDNN dense", f"the paper's on an {device}, ms", "over its FlashAttention"]
    dense, flash = _ms(rows, "dense", "causal", length), paper_ms["flash"]
    table = [["", *columns], ["dense", or_dash(dense, "{:.1f}"), "1x", f"{flash}", "1x"]]
    for pattern in HASHED + QK:
        ms = _ms(rows, "sparse", pattern, length)
        table.append(
            [
                words(pattern),
                or_dash(ms, "{:.1f}"),
                or_dash(_over(dense, ms), "{:.1f}x"),
                f"{paper_ms[pattern]}",
                f"{flash / paper_ms[pattern]:.2g}x",
            ]
        )
    return markdown(table)


def _ms(rows: Rows, method: str, pattern: str, length: int, heads: int = max(HEADS)) -> float | None:
    return rows.get((method, pattern, heads, length), {}).get(BOTH)


def _over(dense: float | None, ms: float | None) -> float | None:
    return None if dense is None or ms is None else dense / ms
