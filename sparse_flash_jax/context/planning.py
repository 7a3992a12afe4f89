"""Plans of one part's queries over another's keys, at the positions that layout.py gives them.

A part's rows are in the order of their positions, whatever its chunks. So its tokens sort as those of a whole sequence,
and a query still sees one run of the part's sorted keys: between the rows at the bounds of the positions it sees.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Int32

from sparse_flash_jax.context.layout import Part
from sparse_flash_jax.kernels.tiles import Runs
from sparse_flash_jax.plan import AttentionPlan
from sparse_flash_jax.planning import PLAN_NAME
from sparse_flash_jax.rule import Rule
from sparse_flash_jax.sorting import SortedTokens, largest_group, runs_between, sort_tokens


def sort_rows(
    groups: tuple[Int32[Array, "#B L #A"], ...], keep: Bool[Array, "#B L #A"] | None, rows: int
) -> SortedTokens:
    """Sorts the tokens of a part, or of the whole sequence in order: kept ones first, by (*groups, position)."""
    groups, keep = jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), (groups, keep))
    return jax.tree.map(lambda x: checkpoint_name(x, PLAN_NAME), sort_tokens(groups, keep, rows, None))


def runs_of_parts(queries: SortedTokens, keys: SortedTokens, of_queries: Part, of_keys: Part, rule: Rule) -> Runs:
    """Returns the key slots of one part that each query slot of another sees, and the transpose.

    Args:
        queries: sorted; position is the row in its part.
        keys: sorted likewise.
        of_queries: which part the queries are.
        of_keys: which part the keys are.
        rule: of positions in the whole sequence.
    """
    heads = max(queries.num_kept.shape[1], keys.num_kept.shape[1])

    def between(rows, columns, positions, of_columns):
        bounds = tuple(of_columns.rows_before(position) for position in positions)
        return runs_between(rows, columns, bounds, heads)

    keys_seen = rule.keys_seen(of_queries.position_of(queries.position), of_keys.layout.length)
    queries_seeing = rule.queries_seeing(of_keys.position_of(keys.position), of_queries.layout.length)
    return Runs(*between(queries, keys, keys_seen, of_keys), *between(keys, queries, queries_seeing, of_queries))


def plan_of_parts(
    queries: SortedTokens, keys: SortedTokens, of_queries: Part, of_keys: Part, rule: Rule
) -> AttentionPlan:
    """Returns the plan of one part's queries over another's keys, or over all: arguments as of `runs_of_parts`."""
    runs = runs_of_parts(queries, keys, of_queries, of_keys, rule)
    return AttentionPlan(
        queries.order,
        queries.slot,
        keys.order,
        keys.slot,
        jax.tree.map(lambda x: checkpoint_name(x, PLAN_NAME), runs),
        queries.overflow,
        keys.overflow,
        keys.num_kept,
        largest_group(keys) if keys.groups else None,
    )
