"""Exact data-dependent sparse attention for JAX: plan which keys each query sees, attend to just those, train."""

from sparse_flash_jax.attention import hash_sparse_attention as hash_sparse_attention
from sparse_flash_jax.attention import qk_sparse_attention as qk_sparse_attention
from sparse_flash_jax.attention import sparse_attention as sparse_attention
from sparse_flash_jax.block_sparse import block_sparse as block_sparse
from sparse_flash_jax.block_sparse import block_top_k as block_top_k
from sparse_flash_jax.block_sparse import from_flex as from_flex
from sparse_flash_jax.context.attention import context_attention as context_attention
from sparse_flash_jax.context.divided_plan import DividedPlan as DividedPlan
from sparse_flash_jax.context.division import Context as Context
from sparse_flash_jax.context.layout import from_zigzag as from_zigzag
from sparse_flash_jax.context.layout import to_zigzag as to_zigzag
from sparse_flash_jax.context.layout import zigzag_positions as zigzag_positions
from sparse_flash_jax.context.tokens import Tokens as Tokens
from sparse_flash_jax.hashing import lsh_buckets as lsh_buckets
from sparse_flash_jax.keep import random_keep as random_keep
from sparse_flash_jax.keep import score_gate as score_gate
from sparse_flash_jax.keep import top_keep as top_keep
from sparse_flash_jax.kernels.interval import RESIDUAL_NAMES as RESIDUAL_NAMES
from sparse_flash_jax.kernels.interval import ROWS_NAME as ROWS_NAME
from sparse_flash_jax.patterns import causal as causal
from sparse_flash_jax.patterns import chunked as chunked
from sparse_flash_jax.patterns import dilated as dilated
from sparse_flash_jax.patterns import hash_sparse as hash_sparse
from sparse_flash_jax.patterns import packed as packed
from sparse_flash_jax.patterns import qk_sparse as qk_sparse
from sparse_flash_jax.plan import AttentionPlan as AttentionPlan
from sparse_flash_jax.planning import PLAN_NAME as PLAN_NAME
from sparse_flash_jax.planning import make_plan as make_plan
from sparse_flash_jax.positional import intersect as intersect
from sparse_flash_jax.positional import prefix_lm as prefix_lm
from sparse_flash_jax.positional import sinks_and_window as sinks_and_window
from sparse_flash_jax.positional import union as union
from sparse_flash_jax.reference import reference_attention as reference_attention
from sparse_flash_jax.stats import PlanStats as PlanStats
from sparse_flash_jax.time_share import TimeShare as TimeShare
from sparse_flash_jax.time_share import expected_time_share as expected_time_share

__version__ = "0.1.0"
