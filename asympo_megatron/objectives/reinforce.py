"""REINFORCE ("naive" in the ASymPO paper; with a group-relative advantage also known as GPG or RLOO)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from asympo_megatron.batch import ResponseBatch
from asympo_megatron.objectives.base import Objective, WeightScope
from asympo_megatron.objectives.diagnostics import ResponseSums, response_metrics
from asympo_megatron.parallel import SINGLE, ParallelGroups, Stat, spread_to_tokens, sum_per_response


@dataclass(frozen=True)
class Reinforce(Objective):
    """L = (1/N) sum_i A_i n_i, with n_i the mean token NLL of response i."""

    name: ClassVar[str] = "reinforce"
    weight_scope: ClassVar[WeightScope] = "token"

    def weigh(
        self, token_nll_T: Tensor, batch: ResponseBatch, groups: ParallelGroups = SINGLE
    ) -> tuple[Tensor, dict[str, Stat]]:
        """weight_t = c_i A_i / T_i for the tokens t of response i, 0 if it has none."""
        coefficient_R = self.coefficient(batch.advantage_R)
        weight_R = torch.where(batch.token_count_R > 0, coefficient_R / batch.token_count_R, 0.0)
        nll_sum_R = sum_per_response(token_nll_T, batch.response_ids_T, batch.num_responses, groups.context)
        sums = ResponseSums.of_weights(weight_R, nll_sum_R, batch)
        metrics = response_metrics(sums, batch, groups, self.normalizer_count(batch, groups))
        return spread_to_tokens(weight_R, batch.response_ids_T), metrics

    def coefficient(self, advantage_R: Tensor) -> Tensor:
        """c_i A_i; here c_i = 1."""
        return advantage_R
