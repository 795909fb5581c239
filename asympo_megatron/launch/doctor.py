"""`asympo doctor`: what this machine has, and what a configuration would run on it."""

import importlib
import importlib.util
import os
import platform
from importlib import metadata

from asympo_megatron.config import Config, RunDir, data_hash, warm_start_config
from asympo_megatron.objectives import build_objective

_REQUIRED = ("torch", "megatron-core", "transformers", "omegaconf", "aiohttp", "safetensors")
_OPTIONAL = {
    "transformer-engine": "fused attention, norms and GEMMs on GPUs (extra: te)",
    "reasoning-gym": "procedural tasks (extra: tasks)",
    "sglang": "rollout engine; belongs in an environment of its own",
    "wandb": "metrics sink (extra: wandb)",
    "tensorboard": "metrics sink (extra: tensorboard)",
}


def describe_machine() -> str:
    """Versions, devices and optional parts, one a line."""
    import torch

    lines = [f"python {platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores"]
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        lines.append(f"devices: {', '.join(names)} (nccl)")
    else:
        lines.append("devices: CPU only (gloo; the CPU backend of asympo_megatron.mcore.cpu is active)")
    lines += [f"{name} {_version(name) or 'MISSING: pip install ' + name}" for name in _REQUIRED]
    lines += [f"{name} {_version(name) or 'not installed'}: {use}" for name, use in _OPTIONAL.items()]
    lines.append(f"apex FusedAdam {'present' if _has_fused_adam() else 'not installed'}: used by Megatron when present")
    return "\n".join(lines)


def describe_run(config: Config) -> str:
    """What the configuration would do, and every objection that needs no process to find."""
    parallel, batch, rollout = config.parallel, config.batch, config.rollout
    objective = build_objective(config.objective.name, **config.objective.options)
    ranks = parallel.tensor * parallel.pipeline * parallel.context
    needs = ", ".join(sorted(objective.needs)) or "the current policy only"
    lines = [
        f"run: {RunDir.of(config).path}, {config.run.steps} steps, data hash {data_hash(config)}",
        f"model: {config.model.path or config.model.hf.get('model_type', '?')} in {config.model.dtype}, "
        f"init {config.model.init}",
        f"layout: TP {parallel.tensor} x PP {parallel.pipeline} x CP {parallel.context} = {ranks} ranks a replica",
        f"objective: {config.objective.name}, reads {needs}",
        f"step: {batch.groups_per_step} groups x {batch.group_size} responses, "
        f"at most {batch.max_tokens_per_microbatch} tokens a micro-batch",
        f"rollout: {rollout.source}, max_lag_steps {rollout.max_lag_steps} ({rollout.lag_policy})",
    ]
    first = warm_start_config(config)
    if first is not None:
        lines.append(f"warm start: {first.run.steps} steps of {first.objective.name} in {RunDir.of(first).path}")
    return "\n".join(lines)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _has_fused_adam() -> bool:
    """The name `apex` on the package index is another project: only the class counts."""
    if importlib.util.find_spec("apex") is None:
        return False
    try:
        return hasattr(importlib.import_module("apex.optimizers"), "FusedAdam")
    except ImportError:
        return False
