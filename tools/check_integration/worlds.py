"""Runs a check on the ranks of a gloo world of real processes, as slime and miles find it."""

import sys
from pathlib import Path
from typing import Any

import context_parallel
import torch.distributed as dist
from checkout import enter, upstream
from context_parallel import LAYOUTS, Place
from parity import CASES
from torch import Tensor

from asympo_megatron.errors import IntegrationError

Result = tuple[str, str, Tensor]
"""(objective, layout in words, gradient)."""


def gradients(rank: int, name: str, path: Path) -> list[Result]:
    """Every objective in every layout of this world size; module level, so that spawned ranks find it."""
    from megatron.core import mpu

    enter(name, path)
    functions = context_parallel.stack(name)
    results: list[Result] = []
    for dp_size, cp_size in LAYOUTS[dist.get_world_size()]:
        mpu.initialize_model_parallel(context_parallel_size=cp_size)
        if name == "miles":
            _score_exactly()
            _set_parallel_state(mpu)
        place = Place(mpu.get_data_parallel_rank(), dp_size, mpu.get_context_parallel_rank(), cp_size, dist.group.WORLD)
        for case in context_parallel.cases(name, cp_size):
            words = ", ".join([f"DP {dp_size}, CP {cp_size}", *(key for key, value in case.items() if value)])
            for objective in CASES:
                gradient = context_parallel.gradient(functions, place, objective, **case)
                results.append((objective, words, gradient))
        mpu.destroy_model_parallel()
    return results if rank == 0 else []


def _score_exactly() -> None:
    """Give miles megatron.core's plain cross entropy in place of the fused one, which it looks up at every call.

    The fused backward pass rounds the gradient of the logits to bfloat16, whatever their dtype: a relative error of up
    to 2^-8 that any loss has there, and that would hide one of the adapter.
    """
    from megatron.core.fusions import fused_cross_entropy
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    if not hasattr(fused_cross_entropy, "fused_vocab_parallel_cross_entropy"):
        raise IntegrationError("megatron.core has no fused_vocab_parallel_cross_entropy: miles must score otherwise.")

    def plain(logits: Tensor, target: Tensor, _: dist.ProcessGroup) -> Tensor:
        return vocab_parallel_cross_entropy(logits, target)

    fused_cross_entropy.fused_vocab_parallel_cross_entropy = plain


def _set_parallel_state(mpu: Any) -> None:
    """What miles' Megatron backend fills in from ``mpu``."""
    info = upstream("miles.utils.ft_utils.process_group_utils", "GroupInfo")
    state = upstream("miles.backends.training_utils.parallel", "ParallelState")
    groups = {
        "intra_dp": mpu.get_data_parallel_group(),
        "intra_dp_cp": mpu.get_data_parallel_group(with_context_parallel=True),
        "cp": mpu.get_context_parallel_group(),
        "tp": mpu.get_tensor_model_parallel_group(),
        "pp": mpu.get_pipeline_model_parallel_group(),
    }
    filled = {key: info(rank=group.rank(), size=group.size(), group=group) for key, group in groups.items()}
    alone = filled["tp"]
    upstream("miles.backends.training_utils.parallel", "set_parallel_state")(
        state(**filled, ep=alone, etp=alone, indep_dp=alone)
    )


assert str(Path(__file__).parent) in sys.path  # spawned ranks import this module by name
