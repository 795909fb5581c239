"""AsymRE: REINFORCE with a baseline below the mean reward, so that successes count for more than failures."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from asympo_megatron.objectives.base import require_number
from asympo_megatron.objectives.reinforce import Reinforce


@dataclass(frozen=True)
class AsymRE(Reinforce):
    """L = (1/N) sum_i (A_i - delta) n_i: with A = reward - mean, the baseline is mean + delta.

    Reference: arXiv:2506.20520. Meant for advantage.estimator=group_mean: others rescale the reward, but not delta.
    Responses of a group whose rewards are all equal have the coefficient -delta and do train.

    Args:
        delta: shift of the baseline, in units of the reward; below 0 favors positives. 0 is REINFORCE.
    """

    name: ClassVar[str] = "asymre"
    delta: float = -0.1

    def __post_init__(self) -> None:
        require_number(self.name, {"delta": self.delta})

    def coefficient(self, advantage_R: Tensor) -> Tensor:
        """A_i - delta."""
        return advantage_R - self.delta
