"""Objectives: pure maths on packed tokens; each turns detached NLLs into a weight per token."""

from asympo_megatron.objectives.asympo import ASymPO
from asympo_megatron.objectives.base import Normalizer, Objective
from asympo_megatron.objectives.diagnostics import ResponseSums, response_metrics
from asympo_megatron.objectives.grpo import GRPO
from asympo_megatron.objectives.registry import OBJECTIVES, build_objective
from asympo_megatron.objectives.reinforce import Reinforce
from asympo_megatron.objectives.sft import SFT
from asympo_megatron.objectives.spo import SPO

__all__ = [
    "GRPO",
    "OBJECTIVES",
    "SFT",
    "SPO",
    "ASymPO",
    "Normalizer",
    "Objective",
    "Reinforce",
    "ResponseSums",
    "build_objective",
    "response_metrics",
]
