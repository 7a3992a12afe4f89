"""The order in which programs add to dq, which no interpreter runs: a program is a thread, and they interleave."""

import collections
import random
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

from sparse_flash_jax.kernels.config import HopperBlocks
from sparse_flash_jax.kernels.mosaic import dq_sums
from sparse_flash_jax.kernels.mosaic.program import Program, Shapes
from sparse_flash_jax.kernels.walks import Bounds

BLOCK = HopperBlocks(2, 64, 2)
SECONDS = 60  # within which no order takes this long to be gone through


class Counters:
    """Counters as threads wait for them."""

    def __init__(self):
        self.counts, self.changed = collections.Counter(), threading.Condition()
        self.at = self

    def __getitem__(self, index):
        return int(index)

    def signal(self, index, count, **_):
        with self.changed:
            self.counts[index] += count
            self.changed.notify_all()

    def wait(self, index, value, **_):
        with self.changed:
            assert self.changed.wait_for(lambda: self.counts[index] >= int(value), SECONDS), "waits for ever"


def program_of(shapes, tile):
    """The program of a tile of keys, outside of a kernel."""
    program = Program.__new__(Program)
    zero, tiles = jnp.int32(0), -(-shapes.length // shapes.block.rows)
    vars(program).update(shapes=shapes, block=shapes.block, batch=zero, head=zero, warpgroup=zero)
    vars(program).update(row_tiles=tiles, count=1, _first=jnp.int32(tiles - 1 - tile))
    return program


def bounds(kind, keys, queries):
    """q_start and q_stop [1 1 keys]."""
    rng, key = np.random.default_rng(0), np.arange(keys)
    if kind == "causal":
        start, stop = key * queries // keys, np.full(keys, queries)
    elif kind == "full":
        start, stop = np.zeros(keys, int), np.full(keys, queries)
    elif kind == "window":
        start = key * queries // keys
        stop = np.minimum(start + 150, queries)
    elif kind == "empty":
        start = stop = np.full(keys, queries // 2)
    else:
        start, stop = np.sort(rng.integers(0, queries + 1, (2, keys)), axis=1)
        start, stop = np.minimum(start, stop), np.maximum(start, stop)
    return [jnp.asarray(x, jnp.int32)[None, None] for x in (start, stop)]


@pytest.mark.parametrize("kind", ["causal", "full", "window", "empty", "random"])
@pytest.mark.parametrize(("keys", "queries"), [(64, 64), (1024, 960), (640, 2048)])
def test_programs_add_in_one_order(monkeypatch, kind, keys, queries):
    counters, history, failures = Counters(), collections.defaultdict(list), []
    monkeypatch.setattr(dq_sums.pl, "when", lambda condition: lambda body: body() if bool(condition) else None)
    monkeypatch.setattr(dq_sums.plgpu, "semaphore_wait", counters.wait)
    monkeypatch.setattr(dq_sums.plgpu, "semaphore_signal", counters.signal)
    monkeypatch.setattr(dq_sums.plgpu, "wait_smem_to_gmem", lambda *_, **__: None)
    shapes = Shapes(
        block=BLOCK, length=keys, column_tiles=-(-queries // 64), heads=1, group=1, members=1, last_first=True
    )
    start, stop = bounds(kind, keys, queries)
    seen = Bounds(start, stop)

    def run(tile):
        try:
            program = program_of(shapes, tile)
            visited = program.columns(0, seen)
            order = dq_sums.Order(program, visited, seen, 0, counters)
            for j in range(int(visited.start), int(visited.stop)):
                time.sleep(random.random() * 1e-3)
                order.enter(j)
                history[j].append((tile, bool(order.adds(j))))
            order.leave(int(visited.stop) - 1)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(tile,)) for tile in range(-(-keys // BLOCK.rows))]
    for thread in random.sample(threads, len(threads)):
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for j, entries in history.items():
        tiles = [tile for tile, _ in entries]
        assert tiles == sorted(tiles, reverse=True), j
        assert [adds for _, adds in entries] == [False] + [True] * (len(tiles) - 1), j
    runs = zip(seen.start[0, 0].tolist(), seen.stop[0, 0].tolist(), strict=True)
    touched = {j for a, b in runs if b > a for j in range(a // 64, -(-b // 64))}
    assert touched <= history.keys()
