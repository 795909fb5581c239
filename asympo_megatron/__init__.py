"""Asynchronous RL post-training on Megatron-Core without behavior-policy information."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asympo_megatron.batch import ObjectiveOutput, ResponseBatch
    from asympo_megatron.objectives import OBJECTIVES, SPO, ASymPO, build_objective, fused_objective_loss
    from asympo_megatron.parallel import ParallelGroups, token_nll

__version__ = "0.1.0"

__all__ = [
    "OBJECTIVES",
    "SPO",
    "ASymPO",
    "ObjectiveOutput",
    "ParallelGroups",
    "ResponseBatch",
    "build_objective",
    "fused_objective_loss",
    "token_nll",
]

# Imported on first use: `import asympo_megatron` alone loads neither torch nor Megatron.
_HOME = {
    "OBJECTIVES": "objectives",
    "SPO": "objectives",
    "ASymPO": "objectives",
    "ObjectiveOutput": "batch",
    "ParallelGroups": "parallel",
    "ResponseBatch": "batch",
    "build_objective": "objectives",
    "fused_objective_loss": "objectives",
    "token_nll": "parallel",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
