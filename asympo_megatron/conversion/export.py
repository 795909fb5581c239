"""Megatron-Core -> Hugging Face: whole tensors, one at a time, from any TP x PP x EP layout."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from asympo_megatron.conversion.names import entries
from asympo_megatron.conversion.tensors import split_for_hf
from asympo_megatron.errors import ConfigError
from asympo_megatron.mcore import Learner
from asympo_megatron.mcore.shards import Shard


def export_hf(learner: Learner) -> Iterator[tuple[str, Tensor]]:
    """Collective: yield every Hugging Face tensor of the policy, in the order of the forward pass.

    Each parameter is gathered over tensor parallelism by the pipeline stage that holds it and sent to rank 0, one at
    a time, so no rank ever holds the whole model. Every rank must walk to the end.

    Returns:
        (name, tensor on the CPU) on rank 0; on the others the tensor is on the meta device: shape without data.

    Raises:
        ConfigError: the model and the conversion map do not hold the same parameters; on every rank.
    """
    local = {shard.name: shard for shard in learner.shards() if not shard.is_copy}
    owners, descriptions = _survey(local, learner)
    facts = learner.plan.facts
    table = list(entries(facts))
    _check_coverage({entry.megatron for entry in table}, set(owners), facts.model_type)
    for entry in table:
        shape, dtype = descriptions[entry.megatron]
        whole = _collect(local.get(entry.megatron), owners[entry.megatron], shape, dtype, learner)
        yield from split_for_hf(entry, whole, facts)


def _check_coverage(mapped: set[str], held: set[str], model_type: str) -> None:
    """A parameter that is dropped would leave engines with another model than the one that trains."""
    for names, what in ((held - mapped, "has parameters without a Hugging Face name"), (mapped - held, "lacks")):
        if names:
            raise ConfigError(
                f"cannot export: the model {what}: {', '.join(sorted(names)[:4])} ({len(names)} in all), by the "
                f"conversion map of model_type={model_type}. Remove the values of model.megatron that change the model."
            )


def _survey(
    local: Mapping[str, Shard], learner: Learner
) -> tuple[dict[str, list[int]], dict[str, tuple[tuple[int, ...], torch.dtype]]]:
    """Per parameter: the tensor-parallel ranks of the first replica that hold it, and its whole shape and dtype."""
    mine = {}
    for name, shard in local.items():
        if shard.replica == 0:
            shape = (shard.true_rows, *shard.global_shape[1:])
            mine[name] = (shard.rank, shard.size, shape, shard.param.dtype)
    held: list[Any] = [None] * learner.layout.world_size
    dist.all_gather_object(held, mine)
    owners: dict[str, list[int]] = {}
    descriptions = {}
    for rank, names in enumerate(held):
        for name, (tensor_rank, tensor_size, shape, dtype) in names.items():
            owners.setdefault(name, [0] * tensor_size)[tensor_rank] = rank
            descriptions[name] = (shape, dtype)
    return owners, descriptions


def _collect(
    shard: Shard | None, owners: list[int], shape: tuple[int, ...], dtype: torch.dtype, learner: Learner
) -> Tensor:
    layout = learner.layout
    whole = torch.empty(shape, dtype=dtype, device="meta")
    if layout.rank in owners:
        assert shard is not None
        whole = _gather(shard)
        if layout.rank == owners[0] and layout.rank != 0:
            dist.send(whole.contiguous(), dst=0)
    if layout.rank != 0:
        return torch.empty(shape, dtype=dtype, device="meta")
    if owners[0] != 0:
        whole = torch.empty(shape, dtype=dtype, device=layout.device)
        dist.recv(whole, src=owners[0])
    return whole.cpu()


def _gather(shard: Shard) -> Tensor:
    param = shard.param.detach().contiguous()
    if shard.dim is None:
        return shard.join([param])
    parts = [torch.empty_like(param) for _ in range(shard.size)]
    dist.all_gather(parts, param, group=shard.group)
    return shard.join(parts)
