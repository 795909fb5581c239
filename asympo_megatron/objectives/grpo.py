"""GRPO and its variants: the clipped PPO surrogate on group-relative advantages. They differ in defaults alone."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from asympo_megatron.batch import ResponseBatch
from asympo_megatron.objectives.base import Normalizer, WeightScope
from asympo_megatron.objectives.ratio import (
    OldPolicyObjective,
    Terms,
    advantages,
    clipped_terms,
    ratio_of,
    require_clip,
)
from asympo_megatron.parallel import ParallelGroups


@dataclass(frozen=True)
class GRPO(OldPolicyObjective):
    """L = -(1/N) sum_i (1/l_i) sum_t min(r_t A_i, clip(r_t, 1 - clip_low, 1 + clip_high) A_i), r = pi / pi_old.

    GRPO (arXiv:2402.03300) has l_i = T_i, and usually advantage.estimator=mean_std.

    Args:
        clip_low: how far below 1 a ratio is still followed; at most 1.
        clip_high: how far above 1.
    """

    name: ClassVar[str] = "grpo"
    weight_scope: ClassVar[WeightScope] = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        require_clip(self.name, self.clip_low, self.clip_high)

    def terms(self, log_ratio_T: Tensor, token_nll_T: Tensor, batch: ResponseBatch, groups: ParallelGroups) -> Terms:
        """force_t = A_i r_t where the unclipped branch is the smaller one, else 0."""
        return clipped_terms(ratio_of(log_ratio_T), advantages(batch), self.clip_low, self.clip_high)


@dataclass(frozen=True)
class DrGRPO(GRPO):
    """GRPO with l_i a constant, for advantages without division by their standard deviation (arXiv:2503.20783).

    Args:
        constant_tokens: the paper's is the longest response allowed; the default is that of
            rollout.sampling.max_new_tokens.
    """

    name: ClassVar[str] = "dr_grpo"
    normalizer: Normalizer = "constant"
    constant_tokens: int | None = 1024


@dataclass(frozen=True)
class DAPO(GRPO):
    """GRPO with a higher upper clip and a mean over all tokens, l_i = 1 (arXiv:2503.14476).

    Its dynamic sampling and its penalty for overlong responses belong to the rollouts, not to the loss.
    """

    name: ClassVar[str] = "dapo"
    clip_high: float = 0.28
    normalizer: Normalizer = "tokens"
