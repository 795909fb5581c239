"""Sums per response of packed tokens, over context parallelism.

Axis suffixes: T local packed tokens, R responses of the micro-batch, K quantities summed together.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from asympo_megatron.parallel.groups import sum_over


def sum_per_response(
    values_T: Tensor, response_ids_T: Tensor, num_responses: int, context: dist.ProcessGroup | None = None
) -> Tensor:
    """Sum the values of each response over all of its tokens, wherever they lie.

        out[i] = sum over context-parallel ranks, over t with response_ids[t] = i, of values[t]

    One ``index_add`` and one all-reduce of R (x K) floats: no loop over sequences and no gathering of tokens. Not
    summed over tensor parallelism (a vocabulary-parallel NLL is replicated there) nor over data parallelism (a
    response lives on one data-parallel rank).

    Args:
        values_T: [T] or [T, K], detached by this function. Values of untrained tokens are never used, not even NaN.
        response_ids_T: int64 [T], -1 for untrained tokens.
        num_responses: R, the same on every rank of ``context``.
        context: context-parallel group, or None for one rank.

    Returns:
        [R] or [R, K] in max(float32, dtype of ``values_T``), equal on every rank of ``context``.
    """
    values = values_T.detach()
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    # Untrained tokens go to one slot behind the last response, which is cut off: no multiplication by 0, no sync.
    slot_T = torch.where(response_ids_T < 0, num_responses, response_ids_T)
    total = values.new_zeros((num_responses + 1, *values.shape[1:])).index_add_(0, slot_T, values)
    return sum_over(total[:num_responses], context)


def spread_to_tokens(value_R: Tensor, response_ids_T: Tensor) -> Tensor:
    """Give every token the value of its response, and exactly 0 to untrained tokens.

    Args:
        value_R: [R].
        response_ids_T: int64 [T], -1 for untrained tokens.

    Returns:
        [T], the dtype of ``value_R``.
    """
    # Id -1 indexes the zero appended behind the last response; this also covers R = 0.
    return torch.cat([value_R, value_R.new_zeros(1)])[response_ids_T]
