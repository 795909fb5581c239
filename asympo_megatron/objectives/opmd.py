"""OPMD: online policy mirror descent, whose gradient is REINFORCE's over 1 + tau."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from asympo_megatron.objectives.base import require_number
from asympo_megatron.objectives.reinforce import Reinforce


@dataclass(frozen=True)
class OPMD(Reinforce):
    """L = (1/N) sum_i A_i n_i / (1 + tau).

    Reference: the simplified form of Trinity-RFT (arXiv:2505.17826, appendix A), after Kimi k1.5 (arXiv:2501.12599).
    Under Adam a constant factor on the whole loss changes next to nothing but what clipping sees.

    Args:
        tau: strength of the pull towards the current policy.
    """

    name: ClassVar[str] = "opmd"
    tau: float = 1.0

    def __post_init__(self) -> None:
        require_number(self.name, {"tau": self.tau}, low=0, inclusive=True)

    def coefficient(self, advantage_R: Tensor) -> Tensor:
        """A_i / (1 + tau)."""
        return advantage_R / (1 + self.tau)
