"""Plain data that an objective reads and returns.

Axis suffixes: T local packed tokens, R responses of the micro-batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from asympo_megatron.errors import BatchError

UNTRAINED = -1
"""Response id of prompt, padding and tool tokens: they carry no loss."""


@dataclass(frozen=True)
class ResponseBatch:
    """The responses of one micro-batch, as one rank sees them.

    Args:
        response_ids_T: int64 [T]. Row in R of each trained token, -1 for prompt, padding and tool tokens. Any token
            order and any context-parallel layout: ids travel with the tokens.
        advantage_R: float [R]. Advantage of each response, computed on its complete group.
        token_count_R: int64 [R]. Trained tokens of the *whole* response over all context-parallel ranks.
        behavior_logprob_T: float [T] or None. log mu of the sampled tokens (only objectives that declare the need).
        proximal_logprob_T: float [T] or None. log-probs of the proximal (or old) policy.
        reference_logprob_T: float [T] or None. log-probs of the reference policy.
        statistics: name to 0-d tensor: statistics of the whole global batch, the same in every micro-batch.

    Every ``_T`` tensor is aligned with the targets: position t scores target t.

    Raises:
        BatchError: shapes or dtypes that do not fit together. Values are not read: that would synchronise a GPU.
    """

    response_ids_T: Tensor
    advantage_R: Tensor
    token_count_R: Tensor
    behavior_logprob_T: Tensor | None = None
    proximal_logprob_T: Tensor | None = None
    reference_logprob_T: Tensor | None = None
    statistics: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _expect("response_ids_T", self.response_ids_T, 1, integer=True)
        _expect("token_count_R", self.token_count_R, 1, integer=True)
        _expect("advantage_R", self.advantage_R, 1, integer=False)
        if self.advantage_R.shape != self.token_count_R.shape:
            raise BatchError(
                f"advantage_R has shape {tuple(self.advantage_R.shape)} and token_count_R "
                f"{tuple(self.token_count_R.shape)}; both are [R], one entry a response."
            )
        for name in ("behavior_logprob_T", "proximal_logprob_T", "reference_logprob_T"):
            value = getattr(self, name)
            if value is None:
                continue
            _expect(name, value, 1, integer=False)
            if value.shape != self.response_ids_T.shape:
                raise BatchError(
                    f"{name} has shape {tuple(value.shape)}, expected {tuple(self.response_ids_T.shape)}: "
                    "one value a local token, aligned with the targets."
                )

    @property
    def num_responses(self) -> int:
        """Number of responses R of this micro-batch, those without trained tokens included."""
        return self.advantage_R.shape[0]

    def statistic(self, name: str) -> Tensor:
        """A statistic of the whole global batch.

        Raises:
            BatchError: nobody computed it; one micro-batch must not stand in for the whole batch.
        """
        if name not in self.statistics:
            raise BatchError(
                f"the batch carries no statistic {name!r} of the whole global batch. Call objective.statistics() once "
                "a step on all micro-batches (Learner.step does) and pass its result on as ResponseBatch.statistics."
            )
        return self.statistics[name]


@dataclass(frozen=True)
class ObjectiveOutput:
    """What an objective returns: sums and counts, never means.

    Args:
        loss_sum: 0-d, differentiable: sum of weight x token_nll over this rank's tokens.
        normalizer_count: int 0-d tensor, counted on one context-parallel rank only (0 on the others).
        metrics: name to ``Stat``; merged over micro-batches and reduced over DP x CP once a step.
    """

    loss_sum: Tensor
    normalizer_count: Tensor
    metrics: Mapping[str, Any]


def _expect(name: str, value: Tensor, dim: int, *, integer: bool) -> None:
    if value.dim() != dim:
        raise BatchError(f"{name} has shape {tuple(value.shape)}, expected {dim} dimension(s).")
    if integer and value.dtype != torch.int64:
        raise BatchError(f"{name} has dtype {value.dtype}, expected torch.int64; convert it with .long().")
    if not integer and not value.is_floating_point():
        raise BatchError(f"{name} has dtype {value.dtype}, expected a floating type; convert it with .float().")
