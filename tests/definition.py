"""A case's visible pairs by definition, and its plan: each made once a process."""

import functools

import numpy as np

import sparse_flash_jax as sfj
from tests import oracle
from tests.cases import Case


@functools.cache
def visible(case: Case) -> np.ndarray:
    """bool [B N T S], from the oracle."""
    s = case.shape
    sizes = {"batch": s.B, "query_length": s.T, "key_length": s.keys, "query_heads": s.N}
    return oracle.visible(**sizes, **case.arrays(), **case.pattern.options)


@functools.cache
def plan(case: Case) -> sfj.AttentionPlan:
    return case.plan()


def full_mask(plan: sfj.AttentionPlan, case: Case) -> np.ndarray:
    """The plan's mask with its axes of size 1 (and shared heads) written out: bool [B N T S]."""
    s, mask = case.shape, np.asarray(plan.mask())
    mask = np.repeat(mask, s.N // mask.shape[1], axis=1)
    return np.broadcast_to(mask, (s.B, s.N, s.T, s.keys))
