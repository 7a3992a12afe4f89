"""Several rounds of hashes: attention over all that any of them shows, each pair once; forward and every gradient."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparse_flash_jax as sfj
from sparse_flash_jax.kernels.interval import permuted_attention
from sparse_flash_jax.kernels.repeats import Repeats
from sparse_flash_jax.permute import restore_lse
from sparse_flash_jax.rounds import Rounds, attend_in_rounds, hash_rounds, near_plan
from tests.budget import assert_within_budget, judges, with_gradients
from tests.cases import BASE, Case, Pattern, Shape
from tests.gpus import H100, assert_passes_lower, lowered, on, passes_of_a_round, put_device
from tests.jaxprs import largest_array
from tests.test_logits import INTERPRETED

KEY = jax.random.key(0)
CAUSAL = Pattern("causal")
LONELY = Pattern("exclude_self", exclude_self=True)
WINDOW = Pattern("window20", window=20)
BOTH_WAYS = Pattern("both_ways", causal=False)
NAMED = lambda x: getattr(x, "name", str(x))


def drawn(case, rounds, num_buckets=4, near=None):
    """Rounds of random buckets, and of near tokens, and the pairs that they show by definition."""
    s, rng = case.shape, np.random.default_rng(rounds)
    rule = {name: x for name, x in case.pattern.rule.items() if name != "query_offset"}
    shown, plans, ids = np.zeros((s.B, s.N, s.T, s.keys), bool), [], []
    for _ in range(rounds):
        of_queries, of_keys = (rng.integers(0, num_buckets, axes, np.int32) for axes in (s.query_axes, s.key_axes))
        per_head = np.repeat(of_keys, s.N // s.key_heads, axis=2)
        shown |= of_queries.swapaxes(1, 2)[..., None] == per_head.swapaxes(1, 2)[:, :, None]
        ids.append((jnp.asarray(of_queries), jnp.asarray(of_keys)))
        plans.append(sfj.hash_sparse(*ids[-1], **rule))
    if near is not None:
        plans.append(near_plan((s.T, s.keys), near, exclude_self=case.pattern.exclude_self))
        shown |= (np.arange(s.T)[:, None] - np.arange(s.keys)[None])[None, None] < near
    return Rounds(tuple(plans), tuple(ids)), shown & allowed(case)


def allowed(case):
    """Which pairs the rule shows within a bucket."""
    behind = np.arange(case.shape.T)[:, None] - np.arange(case.shape.keys)[None]
    seen = behind >= int(case.pattern.exclude_self) if case.pattern.causal else np.ones(behind.shape, bool)
    return seen if case.pattern.window is None else seen & (behind < case.pattern.window)


@functools.partial(jax.jit, static_argnames=("implementation", "config"))
def attend(inputs, rounds, implementation=None, config=None):
    options = {"implementation": implementation, "config": config}
    return with_gradients(lambda q, k, v: attend_in_rounds(q, k, v, rounds, **options), inputs)


def judged(case, rounds, near=None, **options):
    of_case, shown = drawn(case, rounds, near=near)
    got = attend(case.inputs(), of_case, **options)
    assert_within_budget(got, *judges(case.inputs(), shown))
    return shown


@pytest.mark.parametrize(("pattern", "rounds"), [(WINDOW, 3), (LONELY, 4), (BOTH_WAYS, 2)], ids=NAMED)
def test_as_the_reference(pattern, rounds):
    shown = judged(Case(BASE, pattern), rounds)
    assert pattern is not LONELY or not shown.any(axis=-1).all()


def test_other_lengths_and_one_head_of_keys():
    judged(Case(Shape(B=1, T=40, S=57, N=4, K=1, H=8), CAUSAL), 3)


@pytest.mark.parametrize(("pattern", "rounds", "near"), [(CAUSAL, 2, 9), (LONELY, 1, 5), (WINDOW, 1, 20)], ids=NAMED)
def test_near_tokens_are_seen_once(pattern, rounds, near):
    shown = judged(Case(BASE, pattern), rounds, near)
    if pattern is CAUSAL:
        assert 0 < (shown & ~drawn(Case(BASE, pattern), rounds)[1]).mean() < shown.mean()


def test_near_tokens_of_other_lengths():
    judged(Case(Shape(B=1, T=40, S=57, N=4, K=1, H=8), CAUSAL), 1, 7)


@functools.partial(jax.jit, static_argnames=("implementation", "config"))
def attend_last(inputs, rounds, implementation=None, config=None):
    """What the last round adds."""
    plan = rounds.plans[-1]

    def by_slot(ids, order):
        ids = ids.swapaxes(1, 2)
        return ids if order is None else jnp.take_along_axis(ids, order, axis=2)

    earlier = rounds.buckets[: len(rounds.plans) - 1]
    repeats = Repeats(
        tuple(by_slot(x, plan.query_order) for x, _ in earlier), tuple(by_slot(x, plan.key_order) for _, x in earlier)
    )

    def attention(q, k, v):
        options = {"implementation": implementation, "config": config, "repeats": repeats}
        o, lse = permuted_attention(q, k, v, plan.runs, plan.queries, plan.keys, **options)
        return o, restore_lse(lse, plan.queries)

    return with_gradients(attention, inputs)


@pytest.mark.parametrize("near", [None, 30])
@pytest.mark.parametrize(("implementation", "dtype"), [("triton", "float32"), ("mosaic", "float16")])
def test_interpreted(implementation, dtype, near):
    case = Case(Shape(B=1, T=90, N=2, K=1, H=16), LONELY, dtype)
    of_case, shown = drawn(case, 3 if near is None else 1, 2, near)
    before = np.asarray(of_case._replace(plans=of_case.plans[:-1]).mask())
    got = attend_last(case.inputs(), of_case, implementation, INTERPRETED[implementation])
    assert_within_budget(got, *judges(case.inputs(), shown & ~before))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("head_dim", [64, 128, 192])
@pytest.mark.parametrize(
    ("pattern", "rounds", "near"), [(CAUSAL, 4, None), (LONELY, 2, None), (CAUSAL, 1, 100)], ids=NAMED
)
def test_compiled(pattern, rounds, near, head_dim, dtype):
    judged(Case(Shape(B=2, T=300, N=4, K=2, H=head_dim), pattern, dtype), rounds, near)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_rounds_lower_for_cuda(head_dim):
    assert_passes_lower(passes_of_a_round, head_dim)


def test_near_tokens_are_read_in_place(monkeypatch):
    """The whole call lowers for an H100; what hashes is moved into slots, and nothing for what is near."""
    put_device(monkeypatch)
    x = jax.ShapeDtypeStruct((1, 512, 2, 64), "bfloat16")

    def gradients(q, k, v, do, near):
        attended = functools.partial(sfj.hash_sparse_attention, num_buckets=4, key=KEY, near=near)
        return jax.vjp(attended, q, k, v)[1](do)

    with on(H100):
        one, both = (lowered(functools.partial(gradients, near=near), x, x, x, x) for near in (None, 64))
    moves, kernels = (
        [len(re.findall(name, text)) for text in (one, both)] for name in ('"to_slots', "interval_attention")
    )
    assert moves[0] == moves[1] > 0
    assert kernels[1] == 2 * kernels[0] > 0


def test_the_same_hash_in_all_rounds_is_one():
    case = Case(BASE, LONELY)
    one, _ = drawn(case, 1)
    got, expected = (attend(case.inputs(), Rounds(one.plans * n, one.buckets * n)) for n in (3, 1))
    for name in ("o", "lse"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), name)
    for name in ("dq", "dk", "dv"):
        np.testing.assert_allclose(getattr(got, name), getattr(expected, name), atol=1e-6)


def test_a_round_that_is_hidden_gives_exact_zeros():
    """Its runs are not empty, and the gradients of its lse come in as they are of any other."""
    case = Case(BASE, CAUSAL)
    one, shown = drawn(case, 1)
    assert shown.any()
    got = attend_last(case.inputs(), Rounds(one.plans * 2, one.buckets * 2))
    assert np.isneginf(got.lse).all()
    for name in ("o", "dq", "dk", "dv"):
        assert not np.asarray(getattr(got, name)).any(), name


@pytest.mark.parametrize("options", [{}, {"exclude_self": True, "window": 20, "centred": True, "near": 6}])
def test_in_one_call(options):
    rule = {name: x for name, x in options.items() if name in ("exclude_self", "window")}
    case = Case(BASE, dataclasses.replace(CAUSAL, **rule))
    inputs, centred = case.inputs(), options.get("centred", False)
    buckets = hash_rounds(inputs.q, inputs.k, 8, KEY, 2, centred=centred)
    shown = np.zeros((), bool)
    for of_queries, of_keys in buckets:
        of_keys = np.repeat(np.asarray(of_keys), BASE.N // BASE.key_heads, axis=2)
        shown = shown | (np.asarray(of_queries).swapaxes(1, 2)[..., None] == of_keys.swapaxes(1, 2)[:, :, None])
    assert not all(np.array_equal(x, y) for x, y in zip(*buckets, strict=True))
    shown = shown | (np.arange(BASE.T)[:, None] - np.arange(BASE.keys)[None] < options.get("near", 0))

    @jax.jit
    def attended(inputs):
        attention = functools.partial(sfj.hash_sparse_attention, num_buckets=8, key=KEY, rounds=2, return_residual=True)
        return with_gradients(functools.partial(attention, **options), inputs)

    assert_within_budget(attended(inputs), *judges(inputs, shown & allowed(case)))


def test_one_round_is_one_call():
    q, k, v = Case(BASE, CAUSAL).inputs()[:3]

    def by_hand(q, k, v):
        of_queries = sfj.lsh_buckets(q, 8, KEY, num_rotations=k.shape[2])
        plan = sfj.hash_sparse(of_queries, sfj.lsh_buckets(k, 8, KEY), num_buckets=8)
        return sfj.sparse_attention(q, k, v, plan)

    in_one = functools.partial(sfj.hash_sparse_attention, num_buckets=8, key=KEY, rounds=1)
    assert str(jax.make_jaxpr(in_one)(q, k, v)) == str(jax.make_jaxpr(by_hand)(q, k, v))


def test_mask_and_density():
    case = Case(BASE, LONELY)
    rounds, shown = drawn(case, 3)
    np.testing.assert_array_equal(rounds.mask(), shown)
    density = float(rounds.density())
    assert density == pytest.approx(sum(float(plan.density()) for plan in rounds.plans))
    assert density >= shown.mean() * 2 * BASE.T / (BASE.T + 1)


def test_nothing_quadratic():
    case = Case(Shape(B=1, T=1024, N=1, H=8), CAUSAL)
    q, k, v = case.inputs()[:3]
    loss = lambda q, k, v: sfj.hash_sparse_attention(q, k, v, 16, KEY, rounds=3).sum()
    assert largest_array(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)) < 1024 * 256


def test_mapped():
    inputs = Case(Shape(B=1, T=30, N=2, K=1, H=8), CAUSAL).inputs()
    several = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x[:, ::-1]]), inputs)
    attended = jax.jit(lambda x: sfj.hash_sparse_attention(x.q, x.k, x.v, 4, KEY, rounds=2))
    for i, got in enumerate(jax.vmap(attended)(several)):
        np.testing.assert_allclose(got, attended(jax.tree.map(lambda x, i=i: x[i], several)), atol=1e-6)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(("rounds", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError)])
def test_errors(rounds, error):
    q, k, v = Case(BASE, CAUSAL).inputs()[:3]
    with pytest.raises(error, match="rounds must be"):
        sfj.hash_sparse_attention(q, k, v, 8, KEY, rounds=rounds)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"near": 0}, ValueError, "near must be at least 1, got 0"),
        ({"near": 2.0}, TypeError, "near must be a static Python int"),
        ({"near": 9, "window": 8}, ValueError, "near must be at most the window 8, got 9"),
        ({"near": 9, "causal": False}, ValueError, "near tokens are earlier ones"),
    ],
)
def test_errors_of_near(options, error, message):
    q, k, v = Case(BASE, CAUSAL).inputs()[:3]
    with pytest.raises(error, match=message):
        sfj.hash_sparse_attention(q, k, v, 8, KEY, **options)


def test_one_kernel_for_all_gradients_takes_one_round():
    case = Case(BASE, CAUSAL, "bfloat16")
    q, k, v = case.inputs()[:3]
    config = dataclasses.replace(INTERPRETED["mosaic"], fused=True)
    with pytest.raises(ValueError, match=r"config.fused takes .* one round"):
        permuted_attention(q, k, v, sfj.causal(BASE.T).runs, None, None, config=config, repeats=Repeats((q,), (k,)))
