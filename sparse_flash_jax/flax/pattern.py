"""What a layer sees, as frozen descriptions that make a plan out of its queries and keys.

A pattern is a static choice (hashable, comparable); the plan that it makes depends on the data and on a PRNG key. Both
Flax APIs and the models share these; which one is the faster is left to auto.py. Flax itself is not needed here.
"""

from sparse_flash_jax.flax.patterns.block_top_k import BlockTopK as BlockTopK
from sparse_flash_jax.flax.patterns.dense import Dense as Dense
from sparse_flash_jax.flax.patterns.hash import Hash as Hash
from sparse_flash_jax.flax.patterns.qk import QK as QK
from sparse_flash_jax.flax.patterns.scores import KeepScores as KeepScores
from sparse_flash_jax.flax.patterns.window import Window as Window

Concrete = Dense | Hash | QK | Window | BlockTopK
"""The patterns that are the same at every length."""
