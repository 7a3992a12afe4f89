"""What each device of a divided sequence has to do, counted in its plans: nothing else is computed."""

import functools
from typing import Any

import jax
import numpy as np

from sparse_flash_jax import PlanStats, Tokens
from sparse_flash_jax.context.layout import Layout, Part
from sparse_flash_jax.context.planning import plan_of_parts, sort_rows

HEADS = 4
BLOCK = 128  # queries, and keys, of a tile
HEADER = (
    "most of a device over the mean; ring: tiles where devices wait for one another at each step\n"
    f"{'pattern':<9}{'devices':>8} {'layout':<10}{'pairs':>8}{'tiles':>8}{'ring':>8}{'ring / tiles':>15}"
)


def work(length: int, buckets: list[int], devices: tuple[int, ...]) -> list[dict[str, Any]]:
    """Counts pairs and tiles for each number of buckets (0: causal) and of devices, in order and in a zigzag."""
    records = []
    print(HEADER)
    for number in buckets:
        for parts in devices:
            for zigzag in (False, True):
                records.append(_counted(number, Layout(length, parts, zigzag)))
                print(_row(records[-1]), flush=True)
    return records


def _counted(buckets: int, layout: Layout) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    query_bucket, key_bucket = (rng.integers(0, max(1, buckets), (1, layout.length, HEADS)) for _ in range(2))
    whole, rows = Layout(layout.length), layout.positions().reshape(layout.parts, -1)

    @functools.partial(jax.jit, static_argnames="key_layout")
    def plan(query_ids, key_ids, query_part, key_part, key_layout):
        queries, keys = (sort_rows((ids,) if buckets else (), None, ids.shape[1]) for ids in (query_ids, key_ids))
        return plan_of_parts(queries, keys, Part(layout, query_part), Part(key_layout, key_part), Tokens().rule)

    def stats(query_part: int, key_part: int | None) -> PlanStats:
        """Of one part's keys, or of all."""
        own = query_bucket[:, rows[query_part]].astype(np.int32)
        keys, key_layout = (key_bucket, whole) if key_part is None else (key_bucket[:, rows[key_part]], layout)
        parts = np.int32(query_part), np.int32(key_part or 0)
        planned = plan(own, keys.astype(np.int32), parts[0], parts[1], key_layout)
        return planned.stats(BLOCK, BLOCK)

    devices = range(layout.parts)
    of_all = [stats(device, None) for device in devices]
    steps = np.array([[stats(d, (d - step) % layout.parts).executed_tiles for d in devices] for step in devices])
    pairs, tiles = (np.array([getattr(x, name) for x in of_all]) for name in ("visible_pairs", "executed_tiles"))
    return {
        "pattern": f"hash{buckets}" if buckets else "causal",
        "length": layout.length,
        "devices": layout.parts,
        "layout": "zigzag" if layout.zigzag else "in order",
        "block": BLOCK,
        "pairs": pairs.tolist(),
        "tiles": tiles.tolist(),
        "ring_tiles": steps.tolist(),
        "most_over_mean": {
            "pairs": pairs.max() / pairs.mean(),
            "tiles": tiles.max() / tiles.mean(),
            "ring": steps.max(axis=1).sum() / steps.sum(axis=0).mean(),
        },
        "ring_tiles_over_tiles": steps.sum() / tiles.sum(),
    }


def _row(record: dict[str, Any]) -> str:
    most = record["most_over_mean"]
    return (
        f"{record['pattern']:<9}{record['devices']:>8} {record['layout']:<10}"
        f"{most['pairs']:>8.3f}{most['tiles']:>8.3f}{most['ring']:>8.3f}{record['ring_tiles_over_tiles']:>15.2f}"
    )
