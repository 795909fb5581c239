"""GSPO: one ratio per response, the geometric mean of its token ratios."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from asympo_megatron.batch import ResponseBatch
from asympo_megatron.objectives.base import WeightScope
from asympo_megatron.objectives.ratio import (
    OldPolicyObjective,
    Terms,
    advantages,
    clipped_terms,
    ratio_of,
    require_clip,
    response_log_ratio,
)
from asympo_megatron.parallel import ParallelGroups, spread_to_tokens


@dataclass(frozen=True)
class GSPO(OldPolicyObjective):
    """L = -(1/N) sum_i min(s_i A_i, clip(s_i, 1 - clip_low, 1 + clip_high) A_i), s_i = exp((1/T_i) sum_t log r_t).

    Reference: arXiv:2507.18071, clip widths from its section 5.1. Context-parallel ranks exchange R floats, no tokens.

    Args:
        clip_low, clip_high: widths around 1; a mean over a response moves far less than a single ratio.
    """

    name: ClassVar[str] = "gspo"
    weight_scope: ClassVar[WeightScope] = "response"
    clip_low: float = 3e-4
    clip_high: float = 4e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        require_clip(self.name, self.clip_low, self.clip_high)

    def terms(self, log_ratio_T: Tensor, token_nll_T: Tensor, batch: ResponseBatch, groups: ParallelGroups) -> Terms:
        """force_t = A_i s_i where the unclipped branch is the smaller one: T_i terms, each with ds = -(s / T) dnll."""
        mean_R = response_log_ratio(log_ratio_T, batch, groups) / batch.token_count_R.clamp(min=1)
        ratio_T = spread_to_tokens(ratio_of(mean_R), batch.response_ids_T)
        return clipped_terms(ratio_T, advantages(batch), self.clip_low, self.clip_high)
