"""Tables of what single configuration values may be."""

import ipaddress
from collections.abc import Callable, Mapping
from typing import Any

CHOICES: Mapping[str, tuple[str, ...]] = {
    "model.dtype": ("fp32", "bf16"),
    "optimizer.schedule": ("constant", "linear", "cosine"),
    "objective.kl_estimator": ("k1", "k2", "k3"),
    "advantage.estimator": ("group_mean", "mean_std", "leave_one_out", "none"),
    "rollout.source": ("engines", "replay", "supervised"),
    "rollout.engine": ("embedded", "sglang"),
    "rollout.lag_policy": ("admission", "strict", "drop"),
    "rollout.sampling.overlong": ("train", "mask", "penalize"),
    "task.kind": ("reasoning_gym", "jsonl"),
    "task.template": ("chat", "plain"),
    "sync.transport": ("disk", "collective", "colocated"),
    "sync.pause_mode": ("in_place", "retract", "abort"),
    "logging.level": ("DEBUG", "INFO", "WARNING", "ERROR"),
}

SUBSETS: Mapping[str, tuple[str, ...]] = {"logging.sinks": ("tensorboard", "wandb", "prometheus")}
"""Lists whose items are choices."""

AT_LEAST: Mapping[str, float] = {
    "run.steps": 1,
    "parallel.tensor": 1,
    "parallel.pipeline": 1,
    "parallel.context": 1,
    "parallel.expert": 1,
    "batch.groups_per_step": 1,
    "batch.group_size": 1,
    "batch.max_tokens_per_microbatch": 1,
    "optimizer.min_lr": 0,
    "optimizer.warmup_steps": 0,
    "optimizer.weight_decay": 0,
    "optimizer.clip_grad": 0,
    "objective.kl_coef": 0,
    "rollout.num_engines": 1,
    "rollout.max_in_flight_per_engine": 1,
    "rollout.max_lag_steps": 0,
    "rollout.sampling.max_prompt_tokens": 1,
    "rollout.sampling.max_new_tokens": 1,
    "rollout.eval.interval_steps": 0,
    "rollout.eval.samples_per_prompt": 1,
    "rollout.eval.temperature": 0,
    "task.reward_workers": 1,
    "task.reward_retries": 0,
    "task.max_turns": 1,
    "sync.interval_steps": 1,
    "sync.bucket_bytes": 1,
    "sync.keep_last": 1,
    "sync.deltas": 0,
    "checkpoint.interval_steps": 0,
    "checkpoint.keep_last": 1,
}

POSITIVE = (
    "model.init_std",
    "optimizer.lr",
    "optimizer.eps",
    "rollout.sampling.temperature",
    "rollout.request_timeout_s",
    "rollout.engine_timeout_s",
    "rollout.engine_start_timeout_s",
    "task.reward_timeout_s",
    "sync.timeout_s",
)

_Rule = tuple[Callable[[Any], bool], str]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_name(name: str) -> bool:
    return name not in ("", ".", "..") and not set(name) & set("/\\")


_DECAY: _Rule = (lambda value: 0 <= value < 1, "it must be at least 0 and below 1")
_TOP_P: _Rule = (lambda value: 0 < value <= 1, "it must be above 0 and at most 1 (1: off)")
_PORT: _Rule = (lambda value: 0 <= value <= 65535, "a port is a number from 0 (any free one) to 65535")
_COUNT: _Rule = (lambda value: value is None or value >= 1, "it must be at least 1, or null")
_URL: _Rule = (lambda url: url is None or url.startswith(("http://", "https://")), "it is http://HOST:PORT, or null")
_SECRET: _Rule = (lambda value: value != "", "set a secret, or null for none")

RULES: Mapping[str, _Rule] = {
    "run.name": (_is_name, "it names a directory in run.root: not empty, no path separator, neither . nor .."),
    "run.local_ranks": _COUNT,
    "parallel.virtual_pipeline": _COUNT,
    "parallel.expert_tensor": _COUNT,
    "optimizer.beta1": _DECAY,
    "optimizer.beta2": _DECAY,
    "rollout.label_noise": (lambda value: 0 <= value < 1, "it is a probability below 1"),
    "rollout.controller_port": _PORT,
    "rollout.controller_token": _SECRET,
    "rollout.engine_port": _PORT,
    "rollout.engine_api_key": _SECRET,
    "rollout.router_url": _URL,
    "rollout.sampling.top_p": _TOP_P,
    "rollout.sampling.top_k": (lambda value: value == -1 or value >= 1, "it must be at least 1, or -1 (off)"),
    "rollout.sampling.stop_token_ids": (lambda ids: all(one >= 0 for one in ids), "token ids start at 0"),
    "rollout.eval.top_p": _TOP_P,
    "task.environment": (lambda name: name is None or ":" in name, "a function is named pkg.mod:fn; null: none"),
    "sync.mirror_port": _PORT,
    "logging.prometheus_port": _PORT,
}
"""A condition of a value, and what the message says when it does not hold."""
