"""Objectives: pure maths on packed tokens; each turns detached NLLs into a weight per token."""

from asympo_megatron.objectives.asympo import ASymPO
from asympo_megatron.objectives.asymre import AsymRE
from asympo_megatron.objectives.base import Normalizer, Objective
from asympo_megatron.objectives.cispo import CISPO
from asympo_megatron.objectives.decoupled import MIS, TIS, DecoupledPPO, IcePop
from asympo_megatron.objectives.diagnostics import ResponseSums, response_metrics
from asympo_megatron.objectives.fused import fused_objective_loss
from asympo_megatron.objectives.grpo import DAPO, GRPO, DrGRPO
from asympo_megatron.objectives.gspo import GSPO
from asympo_megatron.objectives.kl import KLPenalty, penalize_kl
from asympo_megatron.objectives.m2po import M2PO
from asympo_megatron.objectives.opmd import OPMD
from asympo_megatron.objectives.registry import OBJECTIVES, build_objective
from asympo_megatron.objectives.reinforce import Reinforce
from asympo_megatron.objectives.sapo import SAPO
from asympo_megatron.objectives.sft import SFT
from asympo_megatron.objectives.spo import SPO
from asympo_megatron.objectives.topr import TOPR
from asympo_megatron.objectives.vespo import VESPO

__all__ = [
    "CISPO",
    "DAPO",
    "GRPO",
    "GSPO",
    "M2PO",
    "MIS",
    "OBJECTIVES",
    "OPMD",
    "SAPO",
    "SFT",
    "SPO",
    "TIS",
    "TOPR",
    "VESPO",
    "ASymPO",
    "AsymRE",
    "DecoupledPPO",
    "DrGRPO",
    "IcePop",
    "KLPenalty",
    "Normalizer",
    "Objective",
    "Reinforce",
    "ResponseSums",
    "build_objective",
    "fused_objective_loss",
    "penalize_kl",
    "response_metrics",
]
