import jax.numpy as jnp
import numpy as np
import pytest

from sparse_flash_jax.rule import Rule

RULES = [
    Rule(),
    Rule(exclude_self=True),
    Rule(causal=False),
    Rule(window=1),
    Rule(window=4),
    Rule(exclude_self=True, window=1),
    Rule(exclude_self=True, window=4),
    Rule(causal=False, window=4),
    Rule(window=2**40),
    Rule(causal=False, window=2**40),
]


def sees(rule, back):
    """Whether a query sees a key that lies `back` positions before it."""
    in_order = not rule.causal or back > 0 or (back == 0 and not rule.exclude_self)
    return in_order and (rule.window is None or back < rule.window)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_keys_seen(rule):
    lower, upper = rule.keys_seen(jnp.arange(-3, 12, dtype=jnp.int32), 9)
    for i, start, stop in zip(range(-3, 12), np.asarray(lower), np.asarray(upper), strict=True):
        assert [start <= j < stop for j in range(9)] == [sees(rule, i - j) for j in range(9)], i


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_queries_seeing(rule):
    lower, upper = rule.queries_seeing(jnp.arange(-3, 12, dtype=jnp.int32), 9)
    for j, start, stop in zip(range(-3, 12), np.asarray(lower), np.asarray(upper), strict=True):
        assert [start <= i < stop for i in range(9)] == [sees(rule, i - j) for i in range(9)], j


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_bounds_stay_inside_int32(rule):
    far = jnp.array([0, 2**20], jnp.int32)
    for lower, upper in (rule.keys_seen(far, 2**20), rule.queries_seeing(far, 2**20)):
        assert lower.dtype == upper.dtype == jnp.int32
        assert (np.diff(np.asarray(lower)) >= 0).all()
        assert (np.diff(np.asarray(upper)) >= 0).all()


def test_rule_is_hashable():
    assert Rule(window=3) == Rule(window=3)
    assert hash(Rule(window=3)) == hash(Rule(window=3))


def test_exclude_self_needs_causal():
    with pytest.raises(ValueError, match="exclude_self=True needs causal=True"):
        Rule(causal=False, exclude_self=True)
