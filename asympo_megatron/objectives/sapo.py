"""SAPO: a smooth gate on the ratio instead of a clip."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from asympo_megatron.batch import ResponseBatch
from asympo_megatron.objectives.base import WeightScope, require_number
from asympo_megatron.objectives.ratio import OldPolicyObjective, Terms, advantages, ratio_of
from asympo_megatron.parallel import ParallelGroups


@dataclass(frozen=True)
class SAPO(OldPolicyObjective):
    """L = -(1/N) sum_i (1/T_i) sum_t (4/tau_i) sigmoid(tau_i (r_t - 1)) A_i, tau_i by the sign of A_i.

    Reference: arXiv:2511.20347, with its temperatures.

    Args:
        tau_pos, tau_neg: steepness of the gate for A > 0, and for the rest: a larger one lets go sooner.
    """

    name: ClassVar[str] = "sapo"
    weight_scope: ClassVar[WeightScope] = "token"
    tau_pos: float = 1.0
    tau_neg: float = 1.05

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self.name, {"tau_pos": self.tau_pos, "tau_neg": self.tau_neg}, low=0, inclusive=False)

    def terms(self, log_ratio_T: Tensor, token_nll_T: Tensor, batch: ResponseBatch, groups: ParallelGroups) -> Terms:
        """force_t = A_i r_t 4 g (1 - g), g = sigmoid(tau_i (r_t - 1)): A_i on-policy, where r = 1."""
        ratio_T, advantage_T = ratio_of(log_ratio_T), advantages(batch)
        tau_T = torch.full_like(ratio_T, self.tau_neg).masked_fill(advantage_T > 0, self.tau_pos)
        gate_T = torch.sigmoid(tau_T * (ratio_T - 1))
        return Terms(advantage_T * ratio_T * 4 * gate_T * (1 - gate_T), -4 / tau_T * gate_T * advantage_T)
