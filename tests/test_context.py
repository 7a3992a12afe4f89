"""Sequences divided over devices: the numbers of one device, by either exchange, and only keys travel."""

import dataclasses
import re
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import sparse_flash_jax as sfj
from sparse_flash_jax.context.layout import Layout, Part, sees
from sparse_flash_jax.context.planning import plan_of_parts, sort_rows
from sparse_flash_jax.context.ring import Ring
from sparse_flash_jax.rule import Rule
from tests.gpus import H100, lowered, mesh_of, on, put_device
from tests.jaxprs import primitives
from tests.test_partitioning import moved
from tests.test_transforms import SAVED, assert_same

BATCH, LENGTH, HEADS, KEY_HEADS, HEAD_DIM, BUCKETS = 2, 32, 4, 2, 8, 3
WHOLE_ROWS = ("o", "lse", "dq", "dk", "dv")

needs_eight_devices = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")


class Setting(NamedTuple):
    """A mesh of (batch, heads, sequence), and how keys come to queries."""

    exchange: Literal["ring", "gather"]
    shape: tuple[int, int, int]
    zigzag: bool = False
    kind: AxisType = AxisType.Auto

    def __str__(self):
        return f"{self.exchange}-{'x'.join(map(str, self.shape))}{'-zigzag' * self.zigzag}"

    @property
    def mesh(self):
        return jax.make_mesh(self.shape, ("data", "tensor", "sequence"), axis_types=(self.kind,) * 3)

    @property
    def context(self):
        return sfj.Context("sequence", self.exchange, zigzag=self.zigzag, batch="data", heads="tensor")

    def divided(self, operands):
        """The operands over the mesh, what has one head on all of its devices."""
        mesh = self.mesh

        def put(x):
            spec = PartitionSpec("data", "sequence", "tensor" if x.shape[2] > 1 else None, *[None] * (x.ndim - 3))
            x = sfj.to_zigzag(np.asarray(x), self.shape[2]) if self.zigzag else x
            return jax.device_put(x, NamedSharding(mesh, spec))

        return [put(x) for x in operands]

    def in_order(self, results):
        results = map(np.asarray, results)
        return [sfj.from_zigzag(x, self.shape[2]) if self.zigzag else x for x in results]


def drawn(key_heads=KEY_HEADS, length=LENGTH, key_length=LENGTH, dtype="float32"):
    """q, k, v, and cotangents of o and lse."""
    rng = np.random.default_rng(0)
    queries, keys = (BATCH, length, HEADS), (BATCH, key_length, key_heads)
    q, k, v, do = (jnp.asarray(rng.standard_normal((*s, HEAD_DIM)), dtype) for s in (queries, keys, keys, queries))
    return q, k, v, do, jnp.asarray(rng.standard_normal(queries), jnp.float32)


def with_gradients(attend, q, k, v, do, dlse):
    (o, lse), vjp = jax.vjp(attend, q, k, v)
    return o, lse, *vjp((do, dlse))


def ids(pattern) -> tuple[Any, ...]:
    """Documents, buckets of queries and of keys, and which are kept: each pattern is other data of one program."""
    rng = np.random.default_rng(1)
    queries, keys = (BATCH, LENGTH, HEADS), (BATCH, LENGTH, KEY_HEADS)
    document = np.zeros((BATCH, LENGTH, 1))
    query_bucket, key_bucket, query_keep, key_keep = np.zeros(queries), np.zeros(keys), np.ones(queries), np.ones(keys)
    if pattern in ("hash", "packed and hash", "all"):
        query_bucket, key_bucket = (rng.integers(0, BUCKETS, s) for s in (queries, keys))
    if pattern in ("packed and hash", "all"):
        document = np.broadcast_to(np.arange(LENGTH)[None, :, None] // 11, document.shape)
    if pattern in ("dropping", "all"):
        query_keep, key_keep = (rng.random(s) < 0.5 for s in (queries, keys))
    if (
        pattern == "next to nothing"
    ):  # most rows see nothing, on some devices all, and one batch entry sees nothing at all
        query_keep = rng.random(queries) < 0.2
        key_keep = (rng.random(keys) < 0.2) & (np.arange(BATCH)[:, None, None] == 0)
    groups = (document, query_bucket, key_bucket)
    return *(jnp.asarray(x, jnp.int32) for x in groups), jnp.asarray(query_keep, bool), jnp.asarray(key_keep, bool)


PATTERNS = ("causal", "hash", "packed and hash", "dropping", "all", "next to nothing")


def tokens_of(document, query_bucket, key_bucket, query_keep, key_keep):
    return {
        "query_group": (document, query_bucket),
        "key_group": (document, key_bucket),
        "query_keep": query_keep,
        "key_keep": key_keep,
        "exclude_self": True,
    }


@jax.jit
def on_one_device(operands, ids):
    plan = sfj.make_plan(**tokens_of(*ids))
    return with_gradients(lambda q, k, v: sfj.sparse_attention(q, k, v, plan, return_residual=True), *operands)


def text_of_floats_gathered(compiled):
    """The shapes of all float arrays that a program gathers."""
    lines = re.findall(r"= (.*?) all-gather(?:-start)?\(", compiled.as_text())
    return [tuple(map(int, shape.split(","))) for line in lines for shape in re.findall(r"f32\[([\d,]+)\]", line)]


@needs_eight_devices
@pytest.mark.parametrize(
    "setting",
    [
        Setting("ring", (2, 1, 4)),
        Setting("ring", (1, 2, 4), zigzag=True, kind=AxisType.Explicit),
        Setting("gather", (2, 2, 2), zigzag=True),
    ],
    ids=str,
)
def test_as_on_one_device(setting):
    def attended(operands, ids):
        def attend(q, k, v):
            return sfj.context_attention(q, k, v, sfj.Tokens(**tokens_of(*ids)), setting.context, return_residual=True)

        return with_gradients(attend, *operands)

    operands = drawn()
    parts = setting.divided(operands)
    compiled = jax.jit(attended).lower(parts, setting.divided(ids("causal"))).compile()

    for pattern in PATTERNS:
        got = compiled(parts, setting.divided(ids(pattern)))
        again = compiled(parts, setting.divided(ids(pattern)))
        assert_same(setting.in_order(got), on_one_device(operands, ids(pattern)))
        for x, y, part in zip(got, again, (parts[0], parts[4], *parts[:3]), strict=True):
            np.testing.assert_array_equal(x, y)
            assert x.sharding.is_equivalent_to(part.sharding, x.ndim)

    expected = {"ring": {"collective-permute"}, "gather": {"all-gather", "reduce-scatter"}}
    assert moved(compiled) == expected[setting.exchange]
    whole_keys = BATCH // setting.shape[0], LENGTH, KEY_HEADS // setting.shape[1], HEAD_DIM
    gathered = text_of_floats_gathered(compiled)
    assert sorted(map(np.prod, gathered)) == [np.prod(whole_keys)] * (2 if setting.exchange == "gather" else 0)


@jax.jit
def dense(plan, *operands):
    return with_gradients(
        lambda q, k, v: sfj.reference_attention(q, k, v, plan.mask(), return_residual=True), *operands
    )


@needs_eight_devices
def test_a_window_inside_of_shard_map():
    """Fewer keys than queries, so that late queries see none; the ring stops where no device sees more."""
    operands = drawn(length=64)
    tokens = sfj.Tokens(window=9)

    def part(*operands):
        context = sfj.Context("sequence")
        return with_gradients(
            lambda q, k, v: sfj.context_attention(q, k, v, tokens, context, return_residual=True), *operands
        )

    mesh = jax.make_mesh((2, 4), ("data", "sequence"), axis_types=(AxisType.Auto,) * 2)
    spec = PartitionSpec("data", "sequence")
    run = jax.shard_map(part, mesh=mesh, in_specs=(spec,) * 5, out_specs=(spec,) * 5)
    assert_same(jax.jit(run)(*operands), dense(sfj.causal(64, LENGTH, window=9), *operands))


@needs_eight_devices
def test_causal_in_a_zigzag():
    """In bfloat16, with one key head for all: its gradient is a sum over the devices that have query heads."""
    setting = Setting("ring", (1, 4, 2), zigzag=True)
    operands = drawn(key_heads=1, dtype="bfloat16")

    def attended(*operands):
        return with_gradients(
            lambda q, k, v: sfj.context_attention(q, k, v, sfj.Tokens(), setting.context, return_residual=True),
            *operands,
        )

    compiled = jax.jit(attended).lower(*setting.divided(operands)).compile()
    assert_same(setting.in_order(compiled(*setting.divided(operands))), dense(sfj.causal(LENGTH), *operands))
    # Each device sees some of each part, so that nothing is decided on the way.
    assert "conditional(" not in str(compiled.as_text())
    assert moved(compiled) == {"collective-permute", "all-reduce"}


@pytest.mark.parametrize("zigzag", [False, True])
def test_parts_see_what_the_whole_sees(zigzag):
    document, query_bucket, key_bucket, query_keep, key_keep = ids("all")
    rule, layout = Rule(exclude_self=True, window=20), Layout(LENGTH, 4, zigzag)
    whole = sfj.make_plan(**tokens_of(*ids("all")), window=20)

    def part(x, index):
        rows = layout.positions()[index * layout.rows :][: layout.rows]
        return jax.tree.map(lambda x: x[:, rows], x)

    @jax.jit
    def mask(query_side, key_side, query_part, key_part):
        queries, keys = (sort_rows(groups, keep, layout.rows) for groups, keep in (query_side, key_side))
        return plan_of_parts(queries, keys, Part(layout, query_part), Part(layout, key_part), rule).mask()

    sides = ((document, query_bucket), query_keep), ((document, key_bucket), key_keep)
    masks = [
        [np.asarray(mask(part(sides[0], i), part(sides[1], j), jnp.int32(i), jnp.int32(j))) for j in range(4)]
        for i in range(4)
    ]
    expected = np.asarray(whole.mask())[:, :, layout.positions()][..., layout.positions()]
    np.testing.assert_array_equal(np.block(masks), expected)
    for i, j in np.ndindex(4, 4):
        assert sees(rule, Part(layout, i), Part(layout, j)) or not masks[i][j].any()


def test_layouts_hold_each_position_once():
    for layout in (Layout(24, 3), Layout(24, 3, zigzag=True), Layout(24)):
        positions = layout.positions()
        np.testing.assert_array_equal(np.sort(positions), np.arange(24))
        for index, own in enumerate(positions.reshape(layout.parts, -1)):
            part = Part(layout, index)
            np.testing.assert_array_equal(part.position_of(jnp.arange(layout.rows, dtype=jnp.int32)), own)
            bounds = np.arange(-3, 30, dtype=np.int32)
            np.testing.assert_array_equal(part.rows_before(jnp.asarray(bounds)), (own < bounds[:, None]).sum(axis=1))


def test_a_zigzag_is_undone():
    x = jnp.arange(48).reshape(2, 24)
    laid_out = sfj.to_zigzag(x, 3)
    np.testing.assert_array_equal(laid_out[0], sfj.zigzag_positions(24, 3))
    np.testing.assert_array_equal(sfj.from_zigzag(laid_out, 3), x)
    np.testing.assert_array_equal(sfj.to_zigzag(np.asarray(x).T, 3, axis=0), laid_out.T)


def test_a_ring_stops_where_nobody_sees_more():
    def shown(rule, zigzag=False, parts=4):
        layout = Layout(8 * parts, parts, zigzag)
        return Ring("x", layout, layout, rule, 1.0, "xla", None).shown()

    np.testing.assert_array_equal(shown(Rule()), np.tril(np.ones((4, 4), bool)).T)
    assert shown(Rule(), zigzag=True).all()
    assert shown(Rule(causal=False)).shape == (4, 4)
    # A window of 9 reaches back into the part before, one of 10 into that before it.
    assert [len(shown(Rule(window=window))) for window in (1, 2, 9, 10, 100)] == [1, 2, 2, 3, 4]
    assert len(shown(Rule(exclude_self=True), parts=1)) == 1


def test_a_zigzag_balances():
    """The most pairs of a device over the mean: 4 devices in order see 1, 3, 5 and 7 sixteenths, nearly."""
    worst = {}
    for zigzag in (False, True):
        layout = Layout(512, 4, zigzag)
        seen = (layout.positions() + 1).reshape(4, -1).sum(axis=1)
        worst[zigzag] = seen.max() / seen.mean()
    assert worst[False] == pytest.approx(7 / 4, rel=1e-2)
    assert worst[True] == 1


@needs_eight_devices
def test_saved_residuals_spare_the_backward_pass_the_ring():
    setting = Setting("ring", (1, 1, 8))
    operands = setting.divided(drawn()[:3])
    buckets = setting.divided([ids("hash")[1], ids("hash")[2]])

    def loss(q, k, v, query_bucket, key_bucket):
        tokens = sfj.Tokens(query_bucket, key_bucket)
        return jnp.sum(jnp.sin(sfj.context_attention(jnp.sin(q), k, v, tokens, setting.context)))

    gradient = jax.grad(jax.checkpoint(loss, policy=SAVED), argnums=(0, 1, 2))
    sent = primitives(jax.make_jaxpr(gradient)(*operands, *buckets)).count("ppermute")
    # k with v, and buckets, positions and number of keys round the ring; back with them dk with dv, which go once more
    # at the last part, and home.
    assert sent == 4 + (4 + 1) + 1 + 1


@needs_eight_devices
@pytest.mark.parametrize(
    ("exchange", "once"), [("ring", ["_forward", "_backward"]), ("gather", ["_attend", "_backward"])]
)
def test_layers_alike_are_lowered_once(exchange, once):
    setting = Setting(exchange, (1, 1, 8))
    context = dataclasses.replace(setting.context, mesh=setting.mesh)

    def layers(q, k, v):
        for _ in range(2):
            q = jnp.sin(sfj.context_attention(q, k, v, sfj.Tokens(), context))
        return jnp.sum(q)

    text = jax.jit(jax.grad(layers)).lower(*drawn()[:3]).as_text()
    assert sorted(re.findall(r"func private @(_forward|_attend|_backward)", text)) == sorted(once)


@needs_eight_devices
def test_the_ring_lowers_for_cuda(monkeypatch):
    put_device(monkeypatch)
    operands = drawn(dtype="bfloat16", length=128, key_length=128)[:3]
    context = sfj.Context("data", mesh=mesh_of(H100))

    def summed(q, k, v):
        return jnp.sum(sfj.context_attention(q, k, v, sfj.Tokens(), context).astype(jnp.float32))

    with on(H100):
        text = lowered(jax.grad(summed, argnums=(0, 1, 2)), *operands)
    assert {"mosaic_gpu", "collective_permute"} == {*re.findall("mosaic_gpu|collective_permute|all_gather", text)}


class TestErrors:
    @pytest.fixture(autouse=True)
    def _unchecked(self, without_shape_checks):
        pass

    def call(self, tokens=None, context=None, key_length=LENGTH, length=LENGTH):
        q, k, v, *_ = drawn(length=length, key_length=key_length)
        tokens = sfj.Tokens() if tokens is None else tokens
        return sfj.context_attention(q, k, v, tokens, context or sfj.Context("data", mesh=mesh_of(H100)))

    def test_options(self):
        misspelt: Any = "rign"
        with pytest.raises(ValueError, match="'ring' or 'gather', got 'rign'"):
            sfj.Context("data", misspelt)
        with pytest.raises(ValueError, match="exclude_self=True needs causal=True"):
            sfj.Tokens(causal=False, exclude_self=True)
        with pytest.raises(TypeError, match=r"tokens must be Tokens\(\.\.\.\).*got AttentionPlan"):
            self.call(sfj.causal(LENGTH))

    def test_meshes(self):
        with pytest.raises(ValueError, match=r"must name an axis of the mesh, got 'sequence'.*Context\(mesh=\.\.\.\)"):
            self.call(context=sfj.Context("sequence"))
        with pytest.raises(ValueError, match="over 8 devices must be a multiple of 8 long, got 12; pad it"):
            self.call(key_length=12)
        with pytest.raises(ValueError, match="number of query heads must be a multiple of the 8 devices"):
            self.call(context=sfj.Context("data", heads="data", mesh=mesh_of(H100)))
        with pytest.raises(ValueError, match="8 devices in a zigzag must be a multiple of 16 long, got 24; pad it"):
            self.call(context=sfj.Context("data", zigzag=True, mesh=mesh_of(H100)), length=24, key_length=24)

    def test_ids(self):
        ids = jnp.zeros((1, LENGTH, 1), jnp.int32)
        with pytest.raises(ValueError, match="must be given together, as many arrays each, got 1 and 0"):
            self.call(sfj.Tokens(query_group=ids))
        with pytest.raises(ValueError, match=r"key_group and key_keep must have the shape \(2, 32, 2\) of k"):
            self.call(sfj.Tokens(query_group=ids, key_group=jnp.zeros((1, LENGTH, 4), jnp.int32)))
        with pytest.raises(TypeError, match="query_keep must be bool"):
            self.call(sfj.Tokens(query_keep=ids))
