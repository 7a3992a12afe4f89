"""Arrays under `shard_map`: loops and gradient rules want all their operands to vary over the same mesh axes."""

from typing import Any

import jax
from jax import lax


def vary_alike[Tree](tree: Tree) -> Tree:
    """Returns the tree with each array varying over every manual mesh axis that any of them varies over.

    Outside `shard_map` nothing varies, and the tree comes back as it is.
    """
    axes = frozenset().union(*(_varying(x) for x in jax.tree.leaves(tree)))

    def vary(x: Any) -> Any:
        missing = tuple(sorted(axes - _varying(x), key=str))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, tree)


def varies(tree: Any) -> bool:
    """Whether any of the arrays is a device's own part under `shard_map` or `pmap`."""
    return any(_varying(x) for x in jax.tree.leaves(tree))


def _varying(x: Any) -> frozenset:
    return jax.typeof(x).manual_axis_type.varying
