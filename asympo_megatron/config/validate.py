"""Contradictions between configuration values, found before any process starts."""

from typing import Any
from urllib.parse import urlsplit

from asympo_megatron.config.limits import AT_LEAST, CHOICES, POSITIVE, RULES, SUBSETS, is_loopback
from asympo_megatron.config.schema import Config, ParallelConfig
from asympo_megatron.errors import ConfigError, UnknownNameError


def validate(config: Config) -> None:
    """Check choices, ranges and contradictions.

    Raises:
        ConfigError: the message names the key, the value, what was expected and what to set instead.
    """
    _check_values(config)
    _check_group_size(config)
    _check_lengths(config)
    _check_optimizer(config)
    _check_source(config)
    _check_evaluation(config)
    _check_addresses(config)
    _check_dynamic_sampling(config)
    _check_router(config)
    _check_colocated(config)
    _check_deltas(config)
    _check_parallel(config)
    _check_model(config)


def value_of(config: Config, key: str) -> Any:
    """The value at a dotted key, e.g. ``value_of(config, "rollout.sampling.temperature")``."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _check_values(config: Config) -> None:
    for key, choices in CHOICES.items():
        if value_of(config, key) not in choices:
            raise UnknownNameError(f"value of {key}", str(value_of(config, key)), choices)
    for key, choices in SUBSETS.items():
        for item in value_of(config, key):
            if item not in choices:
                raise UnknownNameError(f"value in {key}", str(item), choices)
    # "not >=" rather than "<": nan is refused, too
    for key, least in AT_LEAST.items():
        if not value_of(config, key) >= least:
            raise ConfigError(f"{key} is {value_of(config, key)}; it must be at least {least}.")
    for key in POSITIVE:
        if not value_of(config, key) > 0:
            raise ConfigError(f"{key} is {value_of(config, key)}; it must be greater than 0.")
    for key, (holds, expected) in RULES.items():
        if not holds(value_of(config, key)):
            raise ConfigError(f"{key} is {value_of(config, key)!r}; {expected}.")


def _check_group_size(config: Config) -> None:
    if config.batch.group_size == 1 and config.advantage.estimator != "none" and config.rollout.source == "engines":
        raise ConfigError(
            f"batch.group_size is 1 with advantage.estimator={config.advantage.estimator}: every advantage would be 0. "
            "Set batch.group_size to 2 or more, or advantage.estimator=none."
        )


def _check_lengths(config: Config) -> None:
    sampling, budget = config.rollout.sampling, config.batch.max_tokens_per_microbatch
    multiple = _pad_multiple(config.parallel)
    longest = sampling.max_prompt_tokens + sampling.max_new_tokens
    needed = -(-longest // multiple) * multiple
    padded = "" if needed == longest else f", {longest} padded to a multiple of {multiple} (parallel.*),"
    if config.rollout.source == "engines" and needed > budget:
        raise ConfigError(
            f"a prompt of {sampling.max_prompt_tokens} and a response of {sampling.max_new_tokens} tokens "
            f"(rollout.sampling){padded} can exceed batch.max_tokens_per_microbatch={budget}. "
            f"Raise it to {needed}, or lower rollout.sampling.max_new_tokens."
        )


def _pad_multiple(parallel: ParallelConfig) -> int:
    """Rows are padded to it: two zigzag chunks a CP rank, equal shards of the TP ranks under sequence parallelism."""
    return (2 * parallel.context if parallel.context > 1 else 1) * (parallel.tensor if parallel.sequence else 1)


def _check_optimizer(config: Config) -> None:
    optimizer = config.optimizer
    if optimizer.min_lr > optimizer.lr:
        raise ConfigError(
            f"optimizer.min_lr={optimizer.min_lr} is above optimizer.lr={optimizer.lr}; schedules only fall. Lower it."
        )
    if optimizer.warmup_steps >= config.run.steps:
        raise ConfigError(
            f"optimizer.warmup_steps={optimizer.warmup_steps} must end before run.steps={config.run.steps}. "
            f"Set optimizer.warmup_steps to {config.run.steps - 1} or less."
        )


def _check_source(config: Config) -> None:
    rollout = config.rollout
    if rollout.source == "replay" and not rollout.replay:
        raise ConfigError("rollout.source=replay needs rollout.replay=FILE, a JSONL file of groups.")
    if rollout.source == "supervised" and config.objective.name != "sft":
        raise ConfigError(
            f"rollout.source=supervised has reference answers and no rewards, but objective.name is "
            f"{config.objective.name}. Set objective.name=sft."
        )
    if rollout.source == "supervised" and config.advantage.estimator != "none":
        raise ConfigError(
            f"rollout.source=supervised has no rewards, but advantage.estimator is {config.advantage.estimator}. "
            "Set advantage.estimator=none."
        )
    if config.sync.interval_steps > rollout.max_lag_steps + 1:
        raise ConfigError(
            f"sync.interval_steps={config.sync.interval_steps} with rollout.max_lag_steps={rollout.max_lag_steps} "
            "would wait for ever: prompts are admitted by the step of the engines' weights. "
            f"Set rollout.max_lag_steps to {config.sync.interval_steps - 1} or more, or lower sync.interval_steps."
        )
    if config.task.kind == "jsonl" and not config.task.path and rollout.source != "replay":
        raise ConfigError("task.kind=jsonl needs task.path, a JSONL file of prompts.")


def _check_evaluation(config: Config) -> None:
    evaluation, every = config.rollout.eval, config.sync.interval_steps
    if not evaluation.interval_steps:
        return
    if evaluation.prompts < 1:
        raise ConfigError(
            f"rollout.eval.prompts is {evaluation.prompts}; it must be at least 1. "
            "Set rollout.eval.interval_steps=0 for no evaluation."
        )
    if config.rollout.source == "engines" and evaluation.interval_steps % every:
        raise ConfigError(
            f"rollout.eval.interval_steps={evaluation.interval_steps} is no multiple of sync.interval_steps={every}: "
            "only published weights are evaluated. "
            f"Set rollout.eval.interval_steps to {-(-evaluation.interval_steps // every) * every}."
        )


def _check_addresses(config: Config) -> None:
    rollout = config.rollout
    if not is_loopback(rollout.controller_host) and rollout.controller_token is None:
        raise ConfigError(
            f"rollout.controller_host={rollout.controller_host} opens the controller to the network. "
            "Set rollout.controller_token to a secret, or listen on 127.0.0.1."
        )
    if config.sync.transport == "collective" and not is_loopback(config.sync.host) and rollout.controller_token is None:
        raise ConfigError(
            f"sync.host={config.sync.host} opens the trainer's weight sender to the network. "
            "Set rollout.controller_token to a secret, or send from 127.0.0.1."
        )


def _check_dynamic_sampling(config: Config) -> None:
    if config.rollout.dynamic_sampling and config.rollout.source != "engines":
        raise ConfigError(
            f"rollout.dynamic_sampling needs rollout.source=engines, not {config.rollout.source}: nothing is sampled "
            "there. Set it to false."
        )


def _check_router(config: Config) -> None:
    if config.rollout.router_url is not None and config.sync.pause_mode == "in_place":
        raise ConfigError(
            "rollout.router_url with sync.pause_mode=in_place: the router chooses which weights a request meets, so "
            "its key of the prefix cache could name others, and stale prompts would be reused. Set "
            "sync.pause_mode=retract (or abort), which empties the cache."
        )


def _check_colocated(config: Config) -> None:
    """Messages that an engine unpickles go no further than this machine."""
    rollout = config.rollout
    if config.sync.transport != "colocated":
        return
    urls = [
        f"rollout.engine_urls has {url}" for url in rollout.engine_urls if not is_loopback(urlsplit(url).hostname or "")
    ]
    hosts = [] if is_loopback(rollout.engine_host) else [f"rollout.engine_host is {rollout.engine_host}"]
    if urls or hosts:
        raise ConfigError(
            f"sync.transport=colocated shares memory with engines on loopback addresses, but {(urls + hosts)[0]}. "
            "Set sync.transport to disk or collective, or start the engines here on 127.0.0.1."
        )


def _check_deltas(config: Config) -> None:
    sync, rollout = config.sync, config.rollout
    if not sync.deltas:
        return
    if sync.transport != "disk":
        raise ConfigError(
            f"sync.deltas={sync.deltas} is for sync.transport=disk, but it is {sync.transport}: what comes from memory "
            "comes whole. Set sync.deltas=0."
        )
    if rollout.engine_urls and not sync.mirror_port:
        raise ConfigError(
            f"sync.deltas={sync.deltas} needs the mirrors of the hosts in rollout.engine_urls: start `asympo mirror` "
            "there, and set sync.mirror_port to their port."
        )
    if not is_loopback(sync.mirror_host) and rollout.controller_token is None:
        raise ConfigError(
            f"sync.mirror_host={sync.mirror_host} opens the mirror to the network. Set rollout.controller_token to a "
            "secret, or listen on 127.0.0.1."
        )


def _check_parallel(config: Config) -> None:
    parallel = config.parallel
    if parallel.sequence and parallel.tensor == 1:
        raise ConfigError("parallel.sequence=true needs parallel.tensor of 2 or more.")
    if parallel.virtual_pipeline is not None and parallel.pipeline < 2:
        raise ConfigError("parallel.virtual_pipeline needs parallel.pipeline of 2 or more.")
    if parallel.expert == 1 and parallel.expert_tensor_size != parallel.tensor:
        raise ConfigError(
            f"parallel.expert_tensor={parallel.expert_tensor} with parallel.expert=1 and parallel.tensor="
            f"{parallel.tensor}: Megatron-Core then sums gradients of experts over the wrong ranks. "
            "Set parallel.expert to 2 or more, or parallel.expert_tensor=null."
        )


def _check_model(config: Config) -> None:
    if not config.model.path and not config.model.hf:
        raise ConfigError(
            "no model: set model.path to a Hugging Face directory, or model.hf to the fields of a config.json."
        )
    if config.model.init == "hf" and not config.model.path:
        raise ConfigError("model.init=hf needs model.path, a Hugging Face directory with safetensors.")
    if config.model.reference == "hf" and not config.model.path:
        raise ConfigError("model.reference=hf needs model.path, a Hugging Face directory with safetensors.")
    if config.model.reference == "random":
        raise ConfigError("model.reference=random names no policy; null takes the weights that model.init names.")
