"""Draws what each pattern shows: by position, and by slot, where every query sees one run of keys.

    python examples/draw_masks.py                           text
    python examples/draw_masks.py --png masks.png           a column for each pattern; needs matplotlib
    python examples/draw_masks.py --opener docs/masks.png   the hash-sparse pattern alone
    python examples/draw_masks.py --each docs/masks         a file for each pattern

In slot order the tiles that a kernel visits are marked, and those of them that are wholly visible and need no mask.
"""

import argparse
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32

import sparse_flash_jax as sfj
from sparse_flash_jax.kernels.tiles import Runs, tile_range
from sparse_flash_jax.kernels.walks import of_queries, tile_at, walk_of
from sparse_flash_jax.plan import mask_of_runs

BLUE, ORANGE, GREEN, PINK, SKY, RED = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
PALETTE = (BLUE, ORANGE, GREEN, PINK, SKY, RED)  # told apart by the colour-blind too (Okabe and Ito)
INK, GRID, WASTED, HIDDEN = "#222222", "#E4E4E4", "#D9D9D9", "#FFFFFF"
COLUMNS = 9  # patterns side by side in a figure


@dataclasses.dataclass(frozen=True)
class Picture:
    """One batch entry and head of a plan, ready to draw."""

    title: str
    by_position: Bool[np.ndarray, "T S"]
    by_slot: Bool[np.ndarray, "T S"]
    visited: Bool[np.ndarray, "tiles_q tiles_k"]
    full: Bool[np.ndarray, "tiles_q tiles_k"]
    block: int
    group: Int[np.ndarray, " T"]
    """Group of the query at each position, which colours its row."""
    slot_group: Int[np.ndarray, " T"]
    """Group of the query in each slot."""

    @property
    def tiles(self) -> str:
        """How many tiles run."""
        return f"{self.visited.sum()} of {self.visited.size} tiles run ({self.visited.mean():.0%})"

    @property
    def caption(self) -> str:
        """How much is visible, and how much runs."""
        return f"{self.by_position.mean():.0%} of pairs visible, {self.tiles}"


def patterns(length: int, seed: int, block: int) -> Iterator[tuple[str, sfj.AttentionPlan, Int32[Array, "1 T 1"]]]:
    """Yields title, plan and colour groups of each pattern; queries and keys are of one sequence.

    Args:
        length: tokens.
        seed: of buckets, dropped tokens and blocks.
        block: tokens along a side of a tile, of which listed blocks are made.
    """
    keys = jax.random.split(jax.random.key(seed), 3)
    bucket = jax.random.randint(keys[0], (1, length, 1), 0, 4, jnp.int32)
    query_keep, key_keep = (sfj.random_keep(key, (1, length, 1), 0.5) for key in keys[1:])
    position = jnp.arange(length, dtype=jnp.int32)[None]
    second, third = (position >= round(share * length) for share in (0.3, 0.75))
    document = second.astype(jnp.int32) + third.astype(jnp.int32)
    both = document[..., None] * 2 + bucket % 2
    one = jnp.zeros_like(bucket)
    window = length // 6
    yield "causal", sfj.causal(length), one
    yield "sliding window", sfj.causal(length, window=window), one
    yield "QK-sparse", sfj.qk_sparse(query_keep, key_keep), one
    yield "hash-sparse", sfj.hash_sparse(bucket, bucket), bucket
    yield "hash-sparse, exclude_self", sfj.hash_sparse(bucket, bucket, exclude_self=True), bucket
    yield "packed", sfj.packed(document), document[..., None]
    yield "packed, 2 buckets", sfj.make_plan(query_group=both, key_group=both), both
    yield "packed, window", sfj.packed(document, window=window), document[..., None]
    yield "hash-sparse, bidirectional", sfj.hash_sparse(bucket, bucket, causal=False), bucket
    far = sfj.causal(length, query_offset=-3 * window)
    yield "chunked", sfj.chunked(length, length // 4), position[..., None] // (length // 4)
    yield "dilated", sfj.dilated(length, 3), position[..., None] % 3
    yield "sinks_and_window", sfj.sinks_and_window(length, length // 12, window), one
    yield (
        "sinks_and_window, packed",
        (sfj.sinks_and_window(length, length // 12, length // 12, segment_ids=document)),
        document[..., None],
    )
    yield "prefix_lm", sfj.prefix_lm(position < length // 4), one
    yield "union of a window, and what is far", sfj.union(sfj.causal(length, window=window), far), one
    size = block * max(round(length / 12 / block), 1)
    count = -(-length // size)
    draw = jax.random.split(keys[0], 3)
    mask = jax.random.bernoulli(draw[0], 0.4, (1, 1, count, count))
    q, k = (jax.random.normal(each, (1, length, 1, 8)) for each in draw[1:])
    blocks = sfj.block_sparse(mask, size, query_length=length, key_length=length)
    yield "block_sparse", blocks, one
    yield "intersection of blocks and a window", sfj.intersect(blocks, sfj.causal(length, window=3 * window)), one
    yield "block_top_k", sfj.block_top_k(q, k, size, 3), one


def picture(title: str, plan: sfj.AttentionPlan, group: Int32[Array, "1 T 1"], block: int) -> Picture:
    """Reads the masks and the tiles off a plan."""
    visited, full = _tiles(plan.runs, block)
    colour = np.asarray(group[0, :, 0])
    return Picture(
        title=title,
        by_position=np.asarray(plan.mask()[0, 0]),
        by_slot=np.asarray(mask_of_runs(plan.runs)[0, 0]),
        visited=visited,
        full=full,
        block=block,
        group=colour,
        slot_group=colour if plan.query_order is None else colour[np.asarray(plan.query_order[0, 0])],
    )


def _tiles(runs: Runs, block: int) -> tuple[Bool[np.ndarray, "tiles_q tiles_k"], Bool[np.ndarray, "tiles_q tiles_k"]]:
    """The tiles that a pass over queries visits, and those of them that are wholly visible."""
    side, tile = of_queries(runs), np.arange(-(-runs.q_start.shape[-1] // block))
    if side.plain:
        start, stop = runs.k_start[0, 0], runs.k_stop[0, 0]
        first = jnp.arange(0, len(start), block)
        last = jnp.minimum(first + block, len(start)) - 1
        tiles = tile_range(start[first], stop[first], start[last], stop[last], block)
        return _between(tile, tiles.start, tiles.stop), _between(tile, tiles.full_start, tiles.full_stop)
    walk = walk_of(side, block, block)
    steps = np.asarray(walk.steps[0, 0])
    visited, full = np.zeros((2, len(steps), len(tile)), bool)
    for row, of_row in enumerate(steps):
        listed = None if walk.lists is None else walk.lists[0, 0, row * block // side.blocks[0]]
        for step in range(of_row[0], of_row[3]):
            at = tile_at(
                jnp.int32(step),
                of_row.__getitem__,
                None if listed is None else listed.__getitem__,
                side.blocks[1] // block,
            )
            visited[row, at], full[row, at] = True, of_row[1] <= step < of_row[2]
    return visited, full


def _between(column: Int[np.ndarray, " n"], start: Array, stop: Array) -> Bool[np.ndarray, "rows n"]:
    return (np.asarray(start)[:, None] <= column) & (column < np.asarray(stop)[:, None])


def as_text(picture: Picture) -> str:
    """Returns the two masks side by side."""
    spread = np.ones((picture.block, picture.block), bool)
    rows, columns = picture.by_slot.shape
    visited, full = (np.kron(x, spread)[:rows, :columns] for x in (picture.visited, picture.full))
    left = np.where(picture.by_position, "██", " ·")
    right = np.select([picture.by_slot & full, picture.by_slot, visited], ["██", "▓▓", "░░"], " ·")
    lines = [f"{picture.title}: {picture.caption}", f"{'by position':<{2 * columns + 4}}by slot"]
    lines += ["".join(a) + "    " + "".join(b) for a, b in zip(left, right, strict=True)]
    return "\n".join(lines)


def as_columns(pictures: list[Picture], path: Path) -> None:
    """Writes a figure with a column for each pattern, in bands of some: by position above, by slot below."""
    from matplotlib.figure import Figure

    columns, bands = min(len(pictures), COLUMNS), -(-len(pictures) // COLUMNS)
    figure = Figure(figsize=(2.5 * columns, 0.5 + 6.5 * bands))
    figure.set_layout_engine("constrained", w_pad=0.06, h_pad=0.1)
    grid = figure.subplots(2 * bands, columns, squeeze=False)
    for ax in grid.flat:
        ax.set_axis_off()
    for number, column in enumerate(pictures):
        band, place = divmod(number, columns)
        above, below = grid[2 * band : 2 * band + 2, place]
        above.set_axis_on()
        below.set_axis_on()
        _draw(above, column.by_position, column.group)
        _draw(below, column.by_slot, column.slot_group, column)
        above.set_title(column.title.replace(", ", ",\n"), fontsize=12, fontweight="bold", color=INK)
        above.set_xlabel("key position", fontsize=10, color=INK)
        below.set_xlabel("key slot\n" + column.caption.replace(", ", "\n"), fontsize=10, color=INK)
        if place == 0:
            above.set_ylabel("query position", fontsize=10, color=INK)
            below.set_ylabel("query slot", fontsize=10, color=INK)
    figure.legend(handles=_legend(), loc="outside lower center", ncols=3, frameon=False, fontsize=11)
    figure.savefig(path, dpi=100)


def as_opener(picture: Picture, path: Path) -> None:
    """Writes one pattern in two panels: by position, and by slot with the tiles that run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.4, 6.2))
    figure.set_layout_engine("constrained", w_pad=0.15, h_pad=0.08)
    left, right = figure.subplots(1, 2)
    _draw(left, picture.by_position, picture.group)
    _draw(right, picture.by_slot, picture.slot_group, picture)
    _bands(left, picture.group)
    _bands(right, picture.slot_group)
    left.set_title("Hash-sparse attention, as the tokens come", fontsize=13, color=INK, pad=20)
    right.set_title("The same pairs, tokens sorted by bucket", fontsize=13, color=INK, pad=20)
    left.set_xlabel("key position", fontsize=11, color=INK)
    left.set_ylabel("query position", fontsize=11, color=INK, labelpad=14)
    right.set_xlabel("key slot", fontsize=11, color=INK)
    right.set_ylabel("query slot", fontsize=11, color=INK, labelpad=14)
    figure.legend(handles=_legend(), loc="outside lower center", ncols=3, frameon=False, fontsize=10.5)
    figure.suptitle(
        f"Every query sees one run of keys: {picture.tiles}, {picture.full.sum()} without a mask",
        fontsize=14,
        fontweight="bold",
        color=INK,
    )
    figure.savefig(path, dpi=130)


def as_pair(picture: Picture, path: Path) -> None:
    """Writes one pattern in two small panels: by position, and by slot with the tiles that run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 3.4))
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.05)
    left, right = figure.subplots(1, 2)
    _draw(left, picture.by_position, picture.group)
    _draw(right, picture.by_slot, picture.slot_group, picture)
    left.set(xlabel="key position", ylabel="query position")
    right.set(xlabel="key slot", ylabel="query slot")
    figure.suptitle(f"{picture.title}: {picture.caption}", fontsize=10, color=INK)
    figure.savefig(path, dpi=100, pil_kwargs={"optimize": True})


def _draw(ax, mask: Bool[np.ndarray, "T S"], group: Int[np.ndarray, " T"], tiled: Picture | None = None) -> None:
    """Draws a mask with its rows coloured by group, and with the tiles of a picture."""
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle

    rows, columns = mask.shape
    row_colour = np.array([to_rgb(colour) for colour in PALETTE])[group % len(PALETTE)]
    ground = np.broadcast_to(np.array(to_rgb(HIDDEN)), (rows, columns, 3))
    if tiled is not None:
        visited = np.kron(tiled.visited, np.ones((tiled.block, tiled.block), bool))[:rows, :columns, None]
        ground = np.where(visited, np.array(to_rgb(WASTED)), ground)
    image = np.where(mask[..., None], row_colour[:, None], ground)
    ax.imshow(image, extent=(0, columns, rows, 0), interpolation="nearest", aspect="equal")
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set_color(GRID)
    if tiled is None:
        return
    block = tiled.block
    for edge in range(block, max(rows, columns), block):
        ax.axhline(edge, color=GRID, linewidth=0.6, zorder=1)
        ax.axvline(edge, color=GRID, linewidth=0.6, zorder=1)
    for row, column in np.argwhere(tiled.visited):
        full = tiled.full[row, column]
        style = {"edgecolor": INK, "linewidth": 1.6 if full else 0.6, "zorder": 3 if full else 2}
        ax.add_patch(Rectangle((column * block, row * block), block, block, fill=False, **style))


def _bands(ax, group: Int[np.ndarray, " T"]) -> None:
    """Shows each token's bucket along both axes."""
    from matplotlib.colors import to_rgb

    colours = np.array([to_rgb(colour) for colour in PALETTE])[group % len(PALETTE)]
    for bounds, image in (((0, 1.015, 1, 0.022), colours[None]), ((-0.037, 0, 0.022, 1), colours[:, None])):
        band = ax.inset_axes(bounds)
        band.imshow(image, aspect="auto", interpolation="nearest")
        band.set_axis_off()


def _legend() -> list:
    from matplotlib.patches import Patch

    return [
        Patch(facecolor=BLUE, edgecolor="none", label="visible pair (a colour for each group)"),
        Patch(facecolor=WASTED, edgecolor=INK, linewidth=0.6, label="tile that runs with a mask (grey: hidden pairs)"),
        Patch(facecolor=BLUE, edgecolor=INK, linewidth=1.8, label="tile wholly visible, no mask"),
    ]


def main(argv: list[str] | None = None) -> None:
    """Prints or draws the patterns; argv None for the command line's."""
    parser = argparse.ArgumentParser(description="Draws each pattern by position and by slot.")
    parser.add_argument("--png", type=Path, help="write a figure with a column for each pattern")
    parser.add_argument("--opener", type=Path, help="write a figure of the hash-sparse pattern alone")
    parser.add_argument("--each", type=Path, help="write a figure of each pattern into this folder")
    parser.add_argument("--length", type=int, help="tokens; default 24 as text, 96 as a figure")
    parser.add_argument("--block", type=int, help="tokens along a side of a tile; default 4 as text, 8 as a figure")
    parser.add_argument("--seed", type=int, default=0, help="seed of buckets and dropped tokens")
    args = parser.parse_args(argv)
    text = args.png is None and args.opener is None and args.each is None
    length, block = args.length or (24 if text else 96), args.block or (4 if text else 8)
    pictures = [picture(*pattern, block=block) for pattern in patterns(length, args.seed, block)]
    if text:
        print("tiles by slot: ██ wholly visible, ▓▓ with a mask, ░░ hidden pair in a tile that runs, · does not run\n")
        print("\n\n".join(as_text(each) for each in pictures))
    if args.png:
        as_columns(pictures, args.png)
    if args.opener:
        as_opener(next(each for each in pictures if each.title == "hash-sparse"), args.opener)
    if args.each:
        args.each.mkdir(parents=True, exist_ok=True)
        for each in pictures:
            as_pair(each, args.each / f"{'-'.join(re.findall(r'[a-z]+|[0-9]+', each.title.lower()))}.png")


if __name__ == "__main__":
    main()
