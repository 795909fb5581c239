"""Process groups as data, per-response sums over context parallelism, vocabulary-parallel token NLL, zigzag split."""

from asympo_megatron.parallel.bounds import largest_bound
from asympo_megatron.parallel.context import merge_context, split_context, zigzag_index
from asympo_megatron.parallel.groups import SINGLE, ParallelGroups
from asympo_megatron.parallel.responses import spread_to_tokens, sum_per_response
from asympo_megatron.parallel.stats import Stat, merge_stats, reduce_stats
from asympo_megatron.parallel.token_nll import token_nll

__all__ = [
    "SINGLE",
    "ParallelGroups",
    "Stat",
    "largest_bound",
    "merge_context",
    "merge_stats",
    "reduce_stats",
    "split_context",
    "spread_to_tokens",
    "sum_per_response",
    "token_nll",
    "zigzag_index",
]
