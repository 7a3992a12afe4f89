"""Tables as Markdown."""


def markdown(rows: list[list[str]]) -> str:
    """Returns a table, the first row being its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def or_dash(x: float | None, form: str) -> str:
    """Returns the cell of a figure; a dash where it is missing."""
    return "-" if x is None else form.format(x)


def span(values: list[float], form: str) -> str:
    """Returns the cell of several figures: the least to the most of them, once where these read alike."""
    return " to ".join(dict.fromkeys(form.format(x) for x in (min(values), max(values))))
