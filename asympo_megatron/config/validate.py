"""Contradictions between configuration values, found before any process starts."""

from typing import Any

from asympo_megatron.config.schema import Config
from asympo_megatron.errors import ConfigError, UnknownNameError

_CHOICES = {
    "model.dtype": ("fp32", "bf16"),
    "optimizer.schedule": ("constant", "linear", "cosine"),
    "advantage.estimator": ("group_mean", "mean_std", "leave_one_out", "none"),
    "rollout.source": ("engines", "replay", "supervised"),
    "rollout.engine": ("embedded", "sglang"),
    "rollout.lag_policy": ("admission", "strict", "drop"),
    "rollout.sampling.overlong": ("train", "mask", "penalize"),
    "task.kind": ("reasoning_gym", "jsonl"),
    "task.template": ("chat", "plain"),
    "sync.transport": ("disk",),
    "sync.pause_mode": ("in_place", "retract", "abort"),
}

_AT_LEAST = {
    "run.steps": 1,
    "parallel.tensor": 1,
    "parallel.pipeline": 1,
    "parallel.context": 1,
    "parallel.expert": 1,
    "batch.groups_per_step": 1,
    "batch.group_size": 1,
    "batch.max_tokens_per_microbatch": 1,
    "optimizer.warmup_steps": 0,
    "rollout.num_engines": 1,
    "rollout.max_in_flight_per_engine": 1,
    "rollout.max_lag_steps": 0,
    "rollout.sampling.max_prompt_tokens": 1,
    "rollout.sampling.max_new_tokens": 1,
    "rollout.eval.interval_steps": 0,
    "rollout.eval.samples_per_prompt": 1,
    "task.reward_workers": 1,
    "task.reward_retries": 0,
    "sync.interval_steps": 1,
    "sync.keep_last": 1,
    "checkpoint.interval_steps": 0,
    "checkpoint.keep_last": 1,
}

_POSITIVE = (
    "optimizer.lr",
    "rollout.sampling.temperature",
    "rollout.request_timeout_s",
    "rollout.engine_timeout_s",
    "rollout.engine_start_timeout_s",
    "task.reward_timeout_s",
    "sync.timeout_s",
)


def validate(config: Config) -> None:
    """Check choices, ranges and contradictions.

    Raises:
        ConfigError: the message names the key, the value, what was expected and what to set instead.
    """
    for key, choices in _CHOICES.items():
        if value_of(config, key) not in choices:
            raise UnknownNameError(f"value of {key}", str(value_of(config, key)), choices)
    for key, least in _AT_LEAST.items():
        if value_of(config, key) < least:
            raise ConfigError(f"{key} is {value_of(config, key)}; it must be at least {least}.")
    for key in _POSITIVE:
        if not value_of(config, key) > 0:
            raise ConfigError(f"{key} is {value_of(config, key)}; it must be greater than 0.")
    _check_group_size(config)
    _check_lengths(config)
    _check_source(config)
    _check_parallel(config)


def value_of(config: Config, key: str) -> Any:
    """The value at a dotted key, e.g. ``value_of(config, "rollout.sampling.temperature")``."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _check_group_size(config: Config) -> None:
    if config.batch.group_size == 1 and config.advantage.estimator != "none" and config.rollout.source == "engines":
        raise ConfigError(
            f"batch.group_size is 1 with advantage.estimator={config.advantage.estimator}: every advantage would be 0. "
            "Set batch.group_size to 2 or more, or advantage.estimator=none."
        )


def _check_lengths(config: Config) -> None:
    sampling, budget = config.rollout.sampling, config.batch.max_tokens_per_microbatch
    longest = sampling.max_prompt_tokens + sampling.max_new_tokens
    if config.rollout.source == "engines" and longest > budget:
        raise ConfigError(
            f"a prompt of {sampling.max_prompt_tokens} and a response of {sampling.max_new_tokens} tokens "
            f"(rollout.sampling) can exceed batch.max_tokens_per_microbatch={budget}. "
            f"Raise it to {longest}, or lower rollout.sampling.max_new_tokens."
        )
    if not 0 <= config.rollout.label_noise < 1:
        raise ConfigError(f"rollout.label_noise is {config.rollout.label_noise}; it is a probability below 1.")


def _check_source(config: Config) -> None:
    rollout = config.rollout
    if rollout.source == "replay" and not rollout.replay:
        raise ConfigError("rollout.source=replay needs rollout.replay=FILE, a JSONL file of groups.")
    if rollout.source == "supervised" and config.objective.name != "sft":
        raise ConfigError(
            f"rollout.source=supervised has reference answers and no rewards, but objective.name is "
            f"{config.objective.name}. Set objective.name=sft."
        )
    if config.sync.interval_steps > rollout.max_lag_steps + 1:
        raise ConfigError(
            f"sync.interval_steps={config.sync.interval_steps} with rollout.max_lag_steps={rollout.max_lag_steps} "
            "would wait for ever: prompts are admitted by the step of the engines' weights. "
            f"Set rollout.max_lag_steps to {config.sync.interval_steps - 1} or more, or lower sync.interval_steps."
        )
    if config.task.kind == "jsonl" and not config.task.path and rollout.source != "replay":
        raise ConfigError("task.kind=jsonl needs task.path, a JSONL file of prompts.")


def _check_parallel(config: Config) -> None:
    parallel = config.parallel
    if parallel.sequence and parallel.tensor == 1:
        raise ConfigError("parallel.sequence=true needs parallel.tensor of 2 or more.")
    if parallel.virtual_pipeline is not None and parallel.pipeline < 2:
        raise ConfigError("parallel.virtual_pipeline needs parallel.pipeline of 2 or more.")
    if not config.model.path and not config.model.hf:
        raise ConfigError(
            "no model: set model.path to a Hugging Face directory, or model.hf to the fields of a config.json."
        )
    if config.model.init == "hf" and not config.model.path:
        raise ConfigError("model.init=hf needs model.path, a Hugging Face directory with safetensors.")
