"""Supervised fine-tuning: the mean NLL of all trained tokens; advantages are ignored."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from asympo_megatron.batch import ResponseBatch
from asympo_megatron.objectives.base import Normalizer, Objective, WeightScope
from asympo_megatron.objectives.diagnostics import ResponseSums, response_metrics
from asympo_megatron.parallel import SINGLE, ParallelGroups, Stat, sum_per_response


@dataclass(frozen=True)
class SFT(Objective):
    """L = sum_t nll_t / (trained tokens of the global batch)."""

    name: ClassVar[str] = "sft"
    weight_scope: ClassVar[WeightScope] = "token"

    @property
    def normalizer(self) -> Normalizer:
        """Every token counts the same."""
        return "tokens"

    def weigh(
        self, token_nll_T: Tensor, batch: ResponseBatch, groups: ParallelGroups = SINGLE
    ) -> tuple[Tensor, dict[str, Stat]]:
        """weight_t = 1 for every trained token."""
        nll_sum_R = sum_per_response(token_nll_T, batch.response_ids_T, batch.num_responses, groups.context)
        sums = ResponseSums.of_weights(torch.ones_like(nll_sum_R), nll_sum_R, batch)
        metrics = response_metrics(sums, batch, groups, self.normalizer_count(batch, groups))
        return torch.ones_like(token_nll_T), metrics
