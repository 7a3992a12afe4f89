"""Tables as Markdown, and the line under each that says what its figures were measured with."""

from typing import Any


def markdown(rows: list[list[str]]) -> str:
    """Returns a table, the first row being its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def source(environment: dict[str, Any], *others: dict[str, Any]) -> str:
    """Returns command, device, version and commit of a result; others differ from it in the commit at most."""
    device = environment["device"].removeprefix("1 x ")
    where = f"{environment['processor']}, {environment['cores']} cores" if device == "cpu" else device
    command = " ".join(environment["command"].split()[:2])  # its options are in the result
    commits = list(dict.fromkeys(each["commit"][:7] for each in (environment, *others)))
    named = f"commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}"
    return f"`{command}` on {where}, jax {environment['jax']}, {named}"
