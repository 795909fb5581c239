"""CISPO: REINFORCE weighted by a clipped ratio, so that no token loses its gradient."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from asympo_megatron.batch import ResponseBatch
from asympo_megatron.errors import ConfigError
from asympo_megatron.objectives.base import Normalizer, WeightScope, require_number
from asympo_megatron.objectives.ratio import OldPolicyObjective, Terms, advantages, ratio_of
from asympo_megatron.parallel import ParallelGroups


@dataclass(frozen=True)
class CISPO(OldPolicyObjective):
    """L = (1/tokens) sum_i sum_t sg(clip(r_t, ratio_min, ratio_max)) A_i nll_t.

    Reference: arXiv:2506.13585, equation 4, with its token mean.

    Args:
        ratio_min: the paper imposes none, which is 0.
        ratio_max: the paper names no value; 5 is ours.
    """

    name: ClassVar[str] = "cispo"
    weight_scope: ClassVar[WeightScope] = "token"
    normalizer: Normalizer = "tokens"
    ratio_min: float = 0.0
    ratio_max: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self.name, {"ratio_min": self.ratio_min, "ratio_max": self.ratio_max}, low=0, inclusive=True)
        if self.ratio_min > self.ratio_max:
            raise ConfigError(
                f"objective 'cispo': ratio_min is {self.ratio_min}, above ratio_max={self.ratio_max}. Lower it."
            )

    def terms(self, log_ratio_T: Tensor, token_nll_T: Tensor, batch: ResponseBatch, groups: ParallelGroups) -> Terms:
        """force_t = clip(r_t) A_i."""
        ratio_T = ratio_of(log_ratio_T)
        bounded_T = ratio_T.clamp(self.ratio_min, self.ratio_max)
        force_T = bounded_T * advantages(batch)
        return Terms(force_T, force_T * token_nll_T, bounded_T != ratio_T)
