"""What a plan is made of, handed over unplanned: each device then plans its own part."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from sparse_flash_jax.rule import Rule
from sparse_flash_jax.validation import check_sides


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("query_group", "key_group", "query_keep", "key_keep"),
    meta_fields=("causal", "exclude_self", "window"),
)
@dataclasses.dataclass(frozen=True)
class Tokens:
    """What `make_plan` takes, for each device to plan its own part: ids and masks of tokens, and a rule.

    With nothing given, causal attention.

    Args:
        query_group: int32 [B|1 T N|1], any values; or a tuple of several, of which all must be equal. None with
            `key_group` None: all in one group.
        key_group: int32 [B|1 S K|1], or a tuple of as many.
        query_keep: bool [B|1 T N|1]; a dropped query outputs 0. None: all are kept.
        key_keep: bool [B|1 S K|1]; a dropped key is seen by nobody. None: all are kept.
        causal: whether a query sees no later key; static, as are those below.
        exclude_self: whether a query also does not see the key of its own position.
        window: positions that a query looks back, its own included; None for all.

    Raises:
        TypeError, ValueError: as `make_plan` on the rule.
    """

    query_group: Int32[Array, "#B T #N"] | tuple[Int32[Array, "#B T #N"], ...] | None = None
    key_group: Int32[Array, "#B S #K"] | tuple[Int32[Array, "#B S #K"], ...] | None = None
    query_keep: Bool[Array, "#B T #N"] | None = None
    key_keep: Bool[Array, "#B S #K"] | None = None
    causal: bool = True
    exclude_self: bool = False
    window: int | None = None

    def __post_init__(self):
        _ = self.rule

    @property
    def rule(self) -> Rule:
        """Which positions of one group see each other."""
        return Rule(self.causal, self.exclude_self, self.window)

    @property
    def groups(self) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """Groups of queries and of keys."""
        of_sides = self.query_group, self.key_group
        queries, keys = (() if x is None else tuple(x) if isinstance(x, tuple | list) else (x,) for x in of_sides)
        return queries, keys


def check_tokens(tokens: Any, q: Array, k: Array) -> None:
    """Raises TypeError or ValueError where ids and masks do not fit one another, or q [B T N H] and k [B S K H]."""
    if not isinstance(tokens, Tokens):
        raise TypeError(f"tokens must be Tokens(...), of ids, masks and a rule, got {type(tokens).__name__}.")
    query_groups, key_groups = tokens.groups
    sides = (("query", q, query_groups, tokens.query_keep), ("key", k, key_groups, tokens.key_keep))
    bare = [jnp.ones((1, x.shape[1], 1), bool) if keep is None else keep for _, x, _, keep in sides]
    check_sides(query_groups, bare[0], key_groups, bare[1])
    for name, x, groups, keep in sides:
        for ids in jax.tree.leaves((groups, keep)):
            fits = ids.shape[1] == x.shape[1] and ids.shape[0] in (1, x.shape[0]) and ids.shape[2] in (1, x.shape[2])
            if not fits:
                raise ValueError(
                    f"{name}_group and {name}_keep must have the shape {x.shape[:3]} of {name[0]}, or 1 for its batch "
                    f"or heads, got {ids.shape}."
                )
