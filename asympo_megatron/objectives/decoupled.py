"""Decoupled PPO, and the corrections that replace its behavior weight: truncated (TIS), masked (IcePop), per response
(MIS).

All have the loss -w_t min(r_t A_i, clip(r_t) A_i) with r = pi / pi_prox and a constant w made of pi_prox / mu. A token
that a mask rejects adds 0 and stays in T_i and N: divisors are fixed before the step.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from asympo_megatron.batch import ResponseBatch
from asympo_megatron.errors import ConfigError
from asympo_megatron.objectives.base import WeightScope, require_number
from asympo_megatron.objectives.ratio import (
    RatioObjective,
    Terms,
    advantages,
    clipped_terms,
    ratio_of,
    require_clip,
    response_log_ratio,
)
from asympo_megatron.parallel import ParallelGroups, spread_to_tokens


@dataclass(frozen=True)
class DecoupledPPO(RatioObjective):
    """L = -(1/N) sum_i (1/T_i) sum_t w_t min(r_t A_i, clip(r_t) A_i), w = pi_prox / mu, r = pi / pi_prox.

    Reference: arXiv:2110.00641, used for asynchronous training by AReaL (arXiv:2505.24298). pi_prox is the policy
    at the start of the batch, recomputed by a scoring pass.

    Args:
        clip_low, clip_high: how far from pi_prox a ratio is still followed.
    """

    name: ClassVar[str] = "decoupled_ppo"
    weight_scope: ClassVar[WeightScope] = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        require_clip(self.name, self.clip_low, self.clip_high)

    @property
    def needs(self) -> frozenset[str]:
        """mu from the engine, pi_prox from a scoring pass."""
        return frozenset({"behavior_logprob_T", "proximal_logprob_T"})

    def old_logprob(self, batch: ResponseBatch) -> Tensor:
        """[T] log pi_prox."""
        assert batch.proximal_logprob_T is not None  # held by ``needs``
        return batch.proximal_logprob_T

    def correction(self, log_weight_T: Tensor, batch: ResponseBatch, groups: ParallelGroups) -> Tensor:
        """[T] w, from log(pi_prox / mu), which is 0 at untrained tokens."""
        return ratio_of(log_weight_T)

    def terms(self, log_ratio_T: Tensor, token_nll_T: Tensor, batch: ResponseBatch, groups: ParallelGroups) -> Terms:
        """force_t = w_t A_i r_t where the unclipped branch is the smaller one, else 0."""
        assert batch.behavior_logprob_T is not None  # held by ``needs``
        log_weight_T = self.old_logprob(batch) - batch.behavior_logprob_T
        log_weight_T = torch.where(batch.response_ids_T >= 0, log_weight_T, 0.0)
        weight_T = self.correction(log_weight_T, batch, groups)
        ppo = clipped_terms(ratio_of(log_ratio_T), advantages(batch), self.clip_low, self.clip_high)
        assert ppo.clipped_T is not None
        return Terms(weight_T * ppo.force_T, weight_T * ppo.value_T, ppo.clipped_T | (weight_T == 0))


@dataclass(frozen=True)
class TIS(DecoupledPPO):
    """Decoupled PPO with w = min(pi_prox / mu, weight_max): truncated importance sampling.

    Reference: F. Yao et al., "Your efficient RL framework secretly brings you off-policy RL training" (2025), against
    the mismatch of trainer and engine.

    Args:
        weight_max: C; 2 as in the usual recipes.
    """

    name: ClassVar[str] = "tis"
    weight_max: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self.name, {"weight_max": self.weight_max}, low=0, inclusive=False)

    def correction(self, log_weight_T: Tensor, batch: ResponseBatch, groups: ParallelGroups) -> Tensor:
        """[T] min(w, C)."""
        return ratio_of(log_weight_T).clamp(max=self.weight_max)


@dataclass(frozen=True)
class IcePop(DecoupledPPO):
    """Decoupled PPO with w 1[weight_min <= w <= weight_max]: tokens on which the policies disagree are left out.

    Reference: arXiv:2510.18855, with its bounds.

    Args:
        weight_min, weight_max: what is kept.
    """

    name: ClassVar[str] = "icepop"
    weight_min: float = 0.5
    weight_max: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self.name, {"weight_min": self.weight_min, "weight_max": self.weight_max}, low=0, inclusive=True)
        if self.weight_min > self.weight_max:
            raise ConfigError(
                f"objective 'icepop': weight_min is {self.weight_min}, above weight_max={self.weight_max}. Lower it."
            )

    def correction(self, log_weight_T: Tensor, batch: ResponseBatch, groups: ParallelGroups) -> Tensor:
        """[T] w, or 0 outside the bounds."""
        weight_T = ratio_of(log_weight_T)
        return torch.where((weight_T >= self.weight_min) & (weight_T <= self.weight_max), weight_T, 0.0)


@dataclass(frozen=True)
class MIS(DecoupledPPO):
    """Decoupled PPO with one weight per response, W 1[W <= weight_max], W = prod_t pi_prox / mu: masked importance
    sampling rejects whole responses.

    Reference: J. Liu, Y. Li et al., "When speed kills stability: demystifying RL collapse from the training-inference
    mismatch" (2025).

    Args:
        weight_max: C; larger products are rejected.
        geometric: take the geometric mean over the tokens instead of the product, which long responses need.
    """

    name: ClassVar[str] = "mis"
    weight_max: float = 2.0
    geometric: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self.name, {"weight_max": self.weight_max}, low=0, inclusive=False)

    def correction(self, log_weight_T: Tensor, batch: ResponseBatch, groups: ParallelGroups) -> Tensor:
        """[T] W of the token's response, or 0."""
        log_weight_R = response_log_ratio(log_weight_T, batch, groups)
        if self.geometric:
            log_weight_R = log_weight_R / batch.token_count_R.clamp(min=1)
        weight_R = ratio_of(log_weight_R)
        return spread_to_tokens(torch.where(weight_R <= self.weight_max, weight_R, 0.0), batch.response_ids_T)
