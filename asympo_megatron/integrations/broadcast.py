"""Advantages that a framework has spread over tokens, brought back to one value a response.

Axis suffixes: T local tokens, R responses of the micro-batch, L padded response positions.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from asympo_megatron.batch import UNTRAINED, ResponseBatch
from asympo_megatron.errors import BatchError
from asympo_megatron.parallel.groups import max_over


def response_value(
    value_T: Tensor, response_ids_T: Tensor, num_responses: int, context: dist.ProcessGroup | None = None
) -> Tensor:
    """The value that all trained tokens of a response share, on every context-parallel rank.

    One MAX all-reduce of [2, R]. Untrained tokens are not looked at; a response without trained tokens gets 0.

    Args:
        value_T: [T], one value a token.
        response_ids_T: int64 [T], -1 for untrained tokens.
        num_responses: R, the same on every rank of ``context``.

    Raises:
        BatchError: the tokens of a response differ; see :func:`require`.
    """
    slot_T = torch.where(response_ids_T < 0, num_responses, response_ids_T)
    extreme_2R = value_T.new_full((2, num_responses + 1), -math.inf)
    extreme_2R.scatter_reduce_(1, slot_T.expand(2, -1), torch.stack([value_T, -value_T]).detach(), "amax")
    high_R, low_R = max_over(extreme_2R[:, :num_responses].contiguous(), context)
    absent_R = high_R == -math.inf
    require(
        (absent_R | (high_R == -low_R)).all(),
        "advantages differ between the tokens of a response: the objective needs one advantage a response. Use an "
        "estimator without a critic, per-token KL or token-level penalties.",
    )
    return torch.where(absent_R, 0.0, high_R)


def gather_responses(
    advantage_T: Tensor,
    response_ids_T: Tensor,
    num_responses: int,
    **logprobs_T: Any,
) -> ResponseBatch:
    """The batch of whole responses: advantages by :func:`response_value`, trained tokens counted.

    Args:
        advantage_T: [T], as the framework has spread them.
        response_ids_T: int64 [T], -1 for untrained tokens.
        num_responses: R.
        **logprobs_T: further fields of :class:`ResponseBatch`.

    Raises:
        BatchError: the advantages of a response differ.
    """
    count_R = torch.zeros(num_responses, dtype=torch.int64, device=response_ids_T.device)
    count_R.index_add_(0, response_ids_T.clamp(min=0), (response_ids_T >= 0).long())
    return ResponseBatch(
        response_ids_T, response_value(advantage_T, response_ids_T, num_responses), count_R, **logprobs_T
    )


def require(holds: Tensor, message: str) -> None:
    """Refuse tensors whose values spoil the gradient, without making a GPU wait for the answer.

    Raises:
        BatchError: ``holds`` (bool, 0-d) is False, on a CPU. On a GPU a device-side assertion fails.
    """
    if holds.device.type == "cpu":
        if not holds:
            raise BatchError(message)
    else:
        torch._assert_async(holds, message)


def padded_ids(mask_RL: Tensor) -> Tensor:
    """Response ids of right-padded rows, flattened to [R x L]; ``mask_RL`` is non-zero at trained tokens."""
    row_R = torch.arange(mask_RL.shape[0], device=mask_RL.device)
    return torch.where(mask_RL > 0, row_R[:, None], UNTRAINED).flatten()
