"""TOPR: positives as in REINFORCE, negatives by a ratio of the whole response that only ever shrinks them."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from asympo_megatron.batch import ResponseBatch
from asympo_megatron.objectives.base import WeightScope
from asympo_megatron.objectives.ratio import RatioObjective, Terms, advantages, response_log_ratio
from asympo_megatron.parallel import ParallelGroups, spread_to_tokens


@dataclass(frozen=True)
class TOPR(RatioObjective):
    """L = (1/N) sum_i a_i A_i n_i, a_i = 1 if A_i >= 0 else sg(clip(W_i, 0, 1)), W_i = prod_t pi / mu.

    Reference: arXiv:2503.14286, on log-probs of whole responses and raw rewards; here, as for every other objective,
    on the mean over tokens and on advantages. ``normalizer=constant, constant_tokens=1`` is the sum over tokens.
    """

    name: ClassVar[str] = "topr"
    weight_scope: ClassVar[WeightScope] = "response"

    def terms(self, log_ratio_T: Tensor, token_nll_T: Tensor, batch: ResponseBatch, groups: ParallelGroups) -> Terms:
        """force_t = a_i A_i."""
        taper_R = response_log_ratio(log_ratio_T, batch, groups).clamp(max=0).exp()
        taper_R = torch.where(batch.advantage_R < 0, taper_R, 1.0)
        force_T = spread_to_tokens(taper_R, batch.response_ids_T) * advantages(batch)
        return Terms(force_T, force_T * token_nll_T, spread_to_tokens(taper_R, batch.response_ids_T) < 1)
