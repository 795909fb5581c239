"""SPO, *Scaled* Policy Optimization: REINFORCE with negatives scaled down by a fixed factor.

Not Single-stream Policy Optimization (arXiv:2509.13232) and not Soft Preference Optimization (arXiv:2405.00747): inside
other frameworks it is registered as ``asympo_spo``.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from asympo_megatron.objectives.base import require_number
from asympo_megatron.objectives.reinforce import Reinforce


@dataclass(frozen=True)
class SPO(Reinforce):
    """L = (1/N) sum_i c_i A_i n_i, c_i = 1 if A_i >= 0 else negative_scale (baseline of arXiv:2606.03070).

    Args:
        negative_scale: 1 is REINFORCE, 0 trains on positives only. The default is ours: the abstract names no value.
    """

    name: ClassVar[str] = "spo"
    negative_scale: float = 0.3

    def __post_init__(self) -> None:
        require_number(self.name, {"negative_scale": self.negative_scale}, low=0, inclusive=True)

    def coefficient(self, advantage_R: Tensor) -> Tensor:
        """c_i A_i."""
        return torch.where(advantage_R < 0, self.negative_scale * advantage_R, advantage_R)
