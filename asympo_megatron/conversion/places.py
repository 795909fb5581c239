"""Where each parameter lies in a Megatron checkpoint (``torch_dist``): its key, and its place in a stack of layers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # registers "fake", as Megatron-LM does for dry runs
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from asympo_megatron.config import Config
from asympo_megatron.config.schema import ParallelConfig
from asympo_megatron.mcore.layout import initialize, shutdown
from asympo_megatron.mcore.model import build_chunks, unwrap
from asympo_megatron.mcore.model_config import plan_model
from asympo_megatron.mcore.shards import shards
from asympo_megatron.parallel import SINGLE

_LAYERS = "decoder.layers."

_MOE_NORM = (".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")
"""Before a mixture of experts: as layers of Transformer Engine keep it, and as Megatron's local ones do."""


@dataclass(frozen=True)
class Place:
    """One whole parameter of the model in a checkpoint.

    Args:
        name: global name (see ``mcore.shards``).
        key: of the tensor in the checkpoint. Megatron stacks the layers (and the experts of a layer) of one kind.
        stack: index of this parameter in each stacked axis, and ``stack_shape`` the sizes of these axes.
        shape: of the parameter itself, without vocabulary padding.
    """

    name: str
    key: str
    stack: tuple[int, ...]
    stack_shape: tuple[int, ...]
    shape: tuple[int, ...]

    def spellings(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Keys under which a checkpoint may hold it, each with the index in its stacked axes."""
        for key in (self.key, self.key.replace(*_MOE_NORM)):
            yield key, self.stack
            if self.stack and key.startswith(_LAYERS):  # layers kept apart (``non_homogeneous_layers``)
                yield f"{_LAYERS}{self.stack[0]}.{key.removeprefix(_LAYERS)}", self.stack[1:]


def find_places(config: Config, hf_config: Mapping[str, Any]) -> list[Place]:
    """Places of all parameters, read off Megatron's own ``sharded_state_dict`` of a model without data.

    Builds a process group of one rank for the time being, so none may exist. The layout of ``config`` does not matter:
    a checkpoint has none.
    """
    model = replace(config.model, megatron={})  # some of Megatron's fields presuppose a layout
    alone = Config(**{**vars(config), "model": model, "parallel": ParallelConfig()})
    # Nothing is sent: making and ending Megatron's 21 groups with gloo takes longer than all else here.
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=1)
    try:
        initialize(alone)
        plan = plan_model(alone, hf_config)
        plan.transformer.use_cpu_initialization = True  # else layers name the GPU themselves, and take its memory
        facts = plan.facts
        alike = facts.moe is None or not facts.moe.dense_layers
        if alike:  # layers differ in their number alone: one stands for all
            plan.transformer.num_layers = 1
        with torch.device("meta"):
            (chunk,) = build_chunks(plan, 1.0, SINGLE)
        names = [shard.name for shard in shards([chunk], facts.vocab_size) if not shard.is_copy]
        model = unwrap(chunk)
        local_names = [name for name, _ in model.named_parameters() if name != "output_layer.weight" or not facts.tied]
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        state = model.sharded_state_dict(metadata={"singleton_local_shards": False, "dp_cp_group": group})
        places = [_place(name, state[local]) for name, local in zip(names, local_names, strict=True)]
        return [each for place in places for each in (_in_every_layer(place, facts.num_layers) if alike else [place])]
    finally:
        shutdown()


def _in_every_layer(place: Place, count: int) -> list[Place]:
    """The place of a parameter of the only layer, in all layers of a stack."""
    if not place.name.startswith(_LAYERS):
        return [place]
    assert place.stack_shape[0] == 1, place
    name, stack_shape = place.name.removeprefix(f"{_LAYERS}0."), (count, *place.stack_shape[1:])
    return [
        replace(place, name=f"{_LAYERS}{number}.{name}", stack=(number, *place.stack[1:]), stack_shape=stack_shape)
        for number in range(count)
    ]


def _place(name: str, entry: Any) -> Place:
    parts: list[ShardedTensor] = [entry] if isinstance(entry, ShardedTensor) else _flat(entry.build())
    first = parts[0]
    axes = first.prepend_axis_num
    assert all((part.key, part.global_offset[:axes]) == (first.key, first.global_offset[:axes]) for part in parts)
    return Place(
        name,
        first.key,
        tuple(first.global_offset[:axes]),
        tuple(first.global_shape[:axes]),
        tuple(first.global_shape[axes:]),
    )


def _flat(built: Any) -> list[ShardedTensor]:
    values = built.values() if isinstance(built, dict) else built
    return [part for part in values if not isinstance(part, ShardedTensorFactory)]
