"""Process groups of a run: torch.distributed, Megatron's parallel_state, seeds. Built once, then plain data."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from asympo_megatron.config import Config
from asympo_megatron.errors import ConfigError
from asympo_megatron.mcore import cpu
from asympo_megatron.parallel import ParallelGroups


@dataclass(frozen=True)
class Layout:
    """Where this rank stands, and with whom it talks.

    Args:
        groups: what objectives and reductions need; None stands for a group of one.
        rank, world_size: of torch.distributed.
        dp_rank, dp_size: which model replica this rank belongs to, of how many.
        pad_multiple: packed sequences are padded to a multiple of this (zigzag chunks).
        device: where tensors of this rank live.
        pack_multiple: a pack is padded at its end to a multiple of this (equal shards under sequence parallelism).
    """

    groups: ParallelGroups
    rank: int
    world_size: int
    dp_rank: int
    dp_size: int
    pad_multiple: int
    device: torch.device
    pack_multiple: int = 1


def initialize(config: Config) -> Layout:
    """Join torch.distributed (torchrun's environment, or alone) and build Megatron's process groups.

    Gloo on CPU, NCCL where CUDA is available. Without CUDA the CPU backend is installed first.

    Raises:
        ConfigError: the number of ranks does not fit ``parallel``.
    """
    cpu.install()
    from megatron.core import parallel_state, tensor_parallel

    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    _check_world_size(config, world_size)
    device = _join(world_size)
    parallel = config.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor_size,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(config.run.seed + 1)
    if device.type == "cpu":
        # Indexed accumulation adds in thread order otherwise; resuming is bit for bit here.
        torch.set_deterministic_debug_mode("error")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return _layout(config, device)


def shutdown() -> None:
    """Undo ``initialize``; safe to call when it failed half-way."""
    from megatron.core import parallel_state

    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    torch.set_deterministic_debug_mode("default")
    cpu.leave()


def _check_world_size(config: Config, world_size: int) -> None:
    parallel = config.parallel
    replica_size = parallel.tensor * parallel.pipeline * parallel.context
    if world_size % replica_size:
        raise ConfigError(
            f"{world_size} rank(s) cannot hold replicas of parallel.tensor={parallel.tensor} x "
            f"parallel.pipeline={parallel.pipeline} x parallel.context={parallel.context} = {replica_size} ranks. "
            f"Start a multiple of {replica_size} (torchrun --nproc-per-node), or lower one of the three."
        )
    expert_size = parallel.expert_tensor_size * parallel.expert * parallel.pipeline
    if world_size % expert_size:
        raise ConfigError(
            f"{world_size} rank(s) cannot hold the experts of parallel.expert={parallel.expert} x "
            f"{parallel.expert_tensor_size} (parallel.expert_tensor) x parallel.pipeline={parallel.pipeline} = "
            f"{expert_size} ranks. Start a multiple of {expert_size} (torchrun --nproc-per-node), or lower "
            "parallel.expert."
        )


def _join(world_size: int) -> torch.device:
    cuda = torch.cuda.is_available()
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    timeout = timedelta(minutes=30)
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        if world_size == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        else:
            dist.init_process_group(backend, timeout=timeout)
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def _layout(config: Config, device: torch.device) -> Layout:
    from megatron.core import parallel_state as state

    rank, world_size = dist.get_rank(), dist.get_world_size()
    dp_rank, dp_size = state.get_data_parallel_rank(), state.get_data_parallel_world_size()
    parallel = config.parallel
    chunks = 2 * parallel.context if parallel.context > 1 else 1
    return Layout(
        groups=megatron_groups(),
        rank=rank,
        world_size=world_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
        pad_multiple=chunks,
        device=device,
        pack_multiple=chunks * (parallel.tensor if parallel.sequence else 1),
    )


def megatron_groups() -> ParallelGroups:
    """The groups of Megatron's ``parallel_state``, whoever initialised it."""
    from megatron.core import parallel_state as state

    return ParallelGroups(
        tensor=_unless_alone(state.get_tensor_model_parallel_group()),
        context=_unless_alone(state.get_context_parallel_group()),
        data_context=_unless_alone(state.get_data_parallel_group(with_context_parallel=True)),
        pipeline=_unless_alone(state.get_pipeline_model_parallel_group()),
    )


def _unless_alone(group: dist.ProcessGroup) -> dist.ProcessGroup | None:
    return None if group.size() == 1 else group
