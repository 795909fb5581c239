"""VESPO: REINFORCE weighted by a smooth function of the ratio of the whole response."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from asympo_megatron.batch import ResponseBatch
from asympo_megatron.objectives.base import Normalizer, WeightScope, require_number
from asympo_megatron.objectives.ratio import MAX_LOG_RATIO, RatioObjective, Terms, advantages, response_log_ratio
from asympo_megatron.parallel import ParallelGroups, spread_to_tokens


@dataclass(frozen=True)
class VESPO(RatioObjective):
    """L = (1/tokens) sum_i phi_i A_i S_i, phi_i = sg(W_i^k exp(lambda (1 - W_i))), W_i = prod_t pi / mu.

    Reference: arXiv:2602.10693; exponents and the token mean are those of the authors' program
    (github.com/FloyedShen/VESPO, recipe/vespo), which picks k and lambda by the sign of A_i.

    Args:
        k_pos, lambda_pos: for A >= 0. k_neg, lambda_neg: for A < 0. phi peaks at W = k / lambda; phi(1) = 1.
    """

    name: ClassVar[str] = "vespo"
    weight_scope: ClassVar[WeightScope] = "response"
    normalizer: Normalizer = "tokens"
    k_pos: float = 2.0
    lambda_pos: float = 3.0
    k_neg: float = 3.0
    lambda_neg: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        options = ("k_pos", "lambda_pos", "k_neg", "lambda_neg")
        require_number(self.name, {option: getattr(self, option) for option in options}, low=0, inclusive=True)

    def terms(self, log_ratio_T: Tensor, token_nll_T: Tensor, batch: ResponseBatch, groups: ParallelGroups) -> Terms:
        """force_t = phi_i A_i."""
        log_ratio_R = response_log_ratio(log_ratio_T, batch, groups).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        negative_R = batch.advantage_R < 0
        k_R = torch.full_like(log_ratio_R, self.k_pos).masked_fill(negative_R, self.k_neg)
        lambda_R = torch.full_like(log_ratio_R, self.lambda_pos).masked_fill(negative_R, self.lambda_neg)
        phi_R = (k_R * log_ratio_R + lambda_R * (1 - log_ratio_R.exp())).exp()
        force_T = spread_to_tokens(phi_R, batch.response_ids_T) * advantages(batch)
        return Terms(force_T, force_T * token_nll_T)
