"""Megatron's data-parallel wrapper, optimizer and learning-rate schedule, from the run configuration."""

from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from asympo_megatron.config import Config
from asympo_megatron.errors import ConfigError
from asympo_megatron.mcore.model_config import DTYPES
from asympo_megatron.mcore.overrides import build_megatron_config

_OWNED_DDP = {
    "use_distributed_optimizer": "optimizer.distributed",
    # finalize_model_grads divides the summed gradient by the count; an average would divide it twice.
    "average_in_collective": "objective.name",
    "use_megatron_fsdp": "optimizer.distributed",
}

_OWNED_OPTIMIZER = {
    "lr": "optimizer.lr",
    "min_lr": "optimizer.min_lr",
    "weight_decay": "optimizer.weight_decay",
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_eps": "optimizer.eps",
    "clip_grad": "optimizer.clip_grad",
    "use_distributed_optimizer": "optimizer.distributed",
    "overlap_param_gather": "ddp.megatron.overlap_param_gather",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "params_dtype": "model.dtype",
}


def wrap_ddp(config: Config, transformer: Any, chunks: list[Any]) -> list[Any]:
    """Each chunk in Megatron's DistributedDataParallel, with gradients accumulated and reduced in float32."""
    base = {
        "grad_reduce_in_fp32": True,
        "use_distributed_optimizer": config.optimizer.distributed,
        "average_in_collective": False,
    }
    ddp = build_megatron_config(DistributedDataParallelConfig, "ddp.megatron", base, config.ddp.megatron, _OWNED_DDP)
    if ddp.overlap_param_gather and not ddp.use_distributed_optimizer:
        raise ConfigError(
            "ddp.megatron.overlap_param_gather=true needs optimizer.distributed=true: without it every rank holds all "
            "weights and nothing is gathered. Set optimizer.distributed=true, or remove it."
        )
    # Later chunks of an interleaved pipeline start their backward first; buckets would only delay them.
    return [DistributedDataParallel(transformer, ddp, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(chunks)]


def build_optimizer(config: Config, chunks: list[Any]) -> Any:
    """Megatron's optimizer over all chunks (distributed over DP if ``optimizer.distributed``)."""
    ours = config.optimizer
    base = {
        "optimizer": "adam",
        "lr": ours.lr,
        "min_lr": ours.min_lr,
        "weight_decay": ours.weight_decay,
        "adam_beta1": ours.beta1,
        "adam_beta2": ours.beta2,
        "adam_eps": ours.eps,
        "clip_grad": ours.clip_grad,
        "use_distributed_optimizer": ours.distributed,
        "overlap_param_gather": chunks[0].ddp_config.overlap_param_gather,
        "bf16": config.model.dtype == "bf16",
        "params_dtype": DTYPES[config.model.dtype],
    }
    options = build_megatron_config(OptimizerConfig, "optimizer.megatron", base, ours.megatron, _OWNED_OPTIMIZER)
    return get_megatron_optimizer(options, chunks, use_gloo_process_groups=True)  # checkpoints are gathered over them


class Schedule:
    """The learning rate as a function of the step alone: nothing of it needs to be checkpointed.

    Step s (from 0) uses position s + 1 of Megatron's schedule, which ends one position behind the last step: the first
    step of a warm-up and the last step of a decay both move the weights.
    """

    def __init__(self, config: Config, optimizer: Any) -> None:
        ours = config.optimizer
        if ours.warmup_steps >= config.run.steps:
            raise ConfigError(
                f"optimizer.warmup_steps={ours.warmup_steps} must end before run.steps={config.run.steps}. Lower it."
            )
        if ours.min_lr > ours.lr:
            raise ConfigError(f"optimizer.min_lr={ours.min_lr} is above optimizer.lr={ours.lr}. Lower it.")
        self._scheduler = OptimizerParamScheduler(
            optimizer,
            init_lr=0.0,
            max_lr=ours.lr,
            min_lr=ours.min_lr,
            lr_warmup_steps=ours.warmup_steps,
            lr_decay_steps=config.run.steps + 1,
            lr_decay_style=ours.schedule,
            start_wd=ours.weight_decay,
            end_wd=ours.weight_decay,
            wd_incr_steps=config.run.steps,
            wd_incr_style="constant",
        )

    def set(self, step: int) -> None:
        """Put the learning rate of optimizer step ``step`` into the optimizer."""
        self._scheduler.num_steps = step
        self._scheduler.step(increment=1)
