"""Whole gradients of a learner's step, by global parameter name, in whatever layout: to compare layouts in tests."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from asympo_megatron.mcore import Learner
from asympo_megatron.mcore.shards import VOCABULARY, Shard, shards


class GradientProbe:
    """Keeps the gradient of every step, as ``finalize_model_grads`` left it: summed, divided, before clipping.

    Args:
        learner: whose schedule calls the probe from now on. ``gradients`` is what its last step had.
    """

    def __init__(self, learner: Learner) -> None:
        self.gradients: dict[str, Tensor] = {}
        transformer = learner.plan.transformer
        finalize = transformer.finalize_model_grads_func

        def finalize_and_keep(*args: Any, **kwargs: Any) -> None:
            finalize(*args, **kwargs)
            self.gradients = gather_gradients(learner)

        transformer.finalize_model_grads_func = finalize_and_keep


def gather_gradients(learner: Learner) -> dict[str, Tensor]:
    """Collective: the parameters that this rank holds (its stage, its experts), each whole over TP and DP.

    The tied output weight of a last stage appears under the embedding's name, whose gradient it must equal.
    """
    for chunk in learner.chunks:
        if chunk.ddp_config.use_distributed_optimizer:
            for group in [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]:
                _complete_buckets(group)
    gradients = {}
    for shard in shards(learner.chunks, learner.plan.facts.vocab_size):
        name = VOCABULARY[0] if shard.is_copy else shard.name
        gradients[name] = shard.join(_parts(shard))
    return gradients


def relative_errors(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, float]:
    """||got - wanted|| / ||wanted|| of each parameter, in float64; where nothing is wanted, anything is infinite."""
    return {name: relative_error(gradient, wanted[name]) for name, gradient in got.items()}


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """L2 norm of the difference over the L2 norm of what is wanted."""
    if got.shape != wanted.shape:
        raise ValueError(f"a gradient has shape {tuple(got.shape)}, expected {tuple(wanted.shape)}.")
    difference = float((got.double() - wanted.double()).norm())
    size = float(wanted.double().norm())
    if size == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / size


def _complete_buckets(group: Any) -> None:
    """A distributed optimizer's rank has reduced its own share of each bucket only: fetch the others'."""
    size = group.intra_distributed_optimizer_instance_size
    rank = group.intra_distributed_optimizer_instance_rank
    for bucket in group.buckets:
        share = bucket.grad_data.chunk(size)[rank].clone()
        dist.all_gather_into_tensor(bucket.grad_data, share, group=group.intra_distributed_optimizer_instance_group)


def _parts(shard: Shard) -> list[Tensor]:
    own: Tensor = shard.param.main_grad.detach().clone()  # type: ignore[attr-defined]
    if shard.dim is None:
        return [own]
    parts = [torch.empty_like(own) for _ in range(shard.size)]
    dist.all_gather(parts, own, group=shard.group)
    return parts
