"""What a function would do, read off its jaxpr and all jaxprs inside it."""

from collections.abc import Iterator
from typing import Any


def equations(jaxpr: Any) -> Iterator[Any]:
    """The equations of a jaxpr, those of loops, branches and inner calls included."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        for parameter in equation.params.values():
            for inner in parameter if isinstance(parameter, list | tuple) else (parameter,):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from equations(inner)


def primitives(jaxpr: Any) -> list[str]:
    """Names of all primitives, once for each equation."""
    return [equation.primitive.name for equation in equations(jaxpr)]


def calls(jaxpr: Any, name: str) -> int:
    """How often the jitted function of this name is called."""
    return sum(equation.params.get("name") == name for equation in equations(jaxpr) if "jaxpr" in equation.params)


def largest_array(jaxpr: Any) -> int:
    """Elements of the largest array that any equation makes."""
    return max(
        (variable.aval.size for equation in equations(jaxpr) for variable in equation.outvars),
        default=0,
    )
