"""REINFORCE with exponentially tilted advantages, as an example of a third party's objective."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from asympo_megatron.objectives import Objective, ResponseSums, response_metrics
from asympo_megatron.parallel import SINGLE, spread_to_tokens, sum_per_response


@dataclass(frozen=True)
class Entropic(Objective):
    """L = (1/N) sum_i (exp(tilt A_i) - 1) / tilt n_i. Not zero-sum: positives pull harder than negatives push.

    Args:
        tilt: above 0; towards 0 it is REINFORCE.
    """

    name: ClassVar[str] = "entropic"
    tilt: float = 1.0

    def weigh(self, token_nll_T, batch, groups=SINGLE):
        """weight_t = (exp(tilt A_i) - 1) / (tilt T_i)."""
        tilted_R = torch.expm1(self.tilt * batch.advantage_R) / self.tilt
        weight_R = torch.where(batch.token_count_R > 0, tilted_R / batch.token_count_R, 0.0)
        nll_sum_R = sum_per_response(token_nll_T, batch.response_ids_T, batch.num_responses, groups.context)
        sums = ResponseSums.of_weights(weight_R, nll_sum_R, batch)
        metrics = response_metrics(sums, batch, groups, self.normalizer_count(batch, groups))
        return spread_to_tokens(weight_R, batch.response_ids_T), metrics
