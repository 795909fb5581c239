"""M2PO: the tokens furthest from the behavior policy are left out until the rest is close enough on average."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from asympo_megatron.batch import ResponseBatch
from asympo_megatron.objectives.base import Normalizer, WeightScope, require_number
from asympo_megatron.objectives.ratio import RatioObjective, Terms, advantages, ratio_of
from asympo_megatron.parallel import SINGLE, ParallelGroups, largest_bound

STATISTIC = "m2_bound"


@dataclass(frozen=True)
class M2PO(RatioObjective):
    """L = -(1/tokens) sum_i sum_t M_t r_t A_i, r = pi / mu, M_t = 0 for the largest (log r_t)^2.

    The mask leaves out as few tokens as possible so that the mean of (log r)^2 over the rest is at most
    ``second_moment``. Which ones depends on the *whole* global batch, so the bound is found once, from a scoring pass;
    tokens that tie with it stay together. Only tokens whose clipping PPO would consider are candidates (A > 0 and
    r > 1, or A < 0 and r < 1), and only they enter the mean.

    Reference: arXiv:2510.01161, threshold 0.04; candidates after its final version (openreview IIgl5MWelz,
    Algorithm 1). Tokens that are left out stay in the divisor.

    Args:
        second_moment: tau, bound of the mean of (log r)^2.
        all_tokens: every trained token is a candidate, as in the first implementations.
    """

    name: ClassVar[str] = "m2po"
    weight_scope: ClassVar[WeightScope] = "token"
    normalizer: Normalizer = "tokens"
    second_moment: float = 0.04
    all_tokens: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self.name, {"second_moment": self.second_moment}, low=0, inclusive=True)

    @property
    def needs(self) -> frozenset[str]:
        """mu from the engine, and pi at the start of the step from a scoring pass."""
        return frozenset({"behavior_logprob_T", "proximal_logprob_T"})

    def statistics(self, batches: Sequence[ResponseBatch], groups: ParallelGroups = SINGLE) -> Mapping[str, Tensor]:
        """The largest squared log-ratio that is kept."""
        parts = [squared_T[candidate_T] for squared_T, candidate_T in map(self._candidates, batches)]
        return {STATISTIC: largest_bound(torch.cat(parts), self.second_moment, groups.data_context)}

    def terms(self, log_ratio_T: Tensor, token_nll_T: Tensor, batch: ResponseBatch, groups: ParallelGroups) -> Terms:
        """force_t = M_t r_t A_i."""
        squared_T, candidate_T = self._candidates(batch)
        dropped_T = candidate_T & (squared_T > batch.statistic(STATISTIC))
        force_T = torch.where(dropped_T, 0.0, ratio_of(log_ratio_T) * advantages(batch))
        return Terms(force_T, -force_T, dropped_T)

    def _candidates(self, batch: ResponseBatch) -> tuple[Tensor, Tensor]:
        """(log r)^2 of the scoring pass in float64, and which tokens may be left out."""
        assert batch.behavior_logprob_T is not None  # both held by ``needs``
        assert batch.proximal_logprob_T is not None
        log_ratio_T = (batch.proximal_logprob_T - batch.behavior_logprob_T).double()
        candidate_T = batch.response_ids_T >= 0
        if not self.all_tokens:
            candidate_T = candidate_T & (log_ratio_T * advantages(batch) > 0)
        return log_ratio_T * log_ratio_T, candidate_T
