"""Prompts, tokens and rewards: what a run trains on and how its responses are judged."""

from asympo_megatron.tasks.codec import Codec
from asympo_megatron.tasks.environment import Environment, build_environment
from asympo_megatron.tasks.items import Prompt
from asympo_megatron.tasks.model_dir import prepare_model_dir
from asympo_megatron.tasks.rewards import Scorer, build_scorer
from asympo_megatron.tasks.supervised import supervised_groups
from asympo_megatron.tasks.task import Task, load_task

__all__ = [
    "Codec",
    "Environment",
    "Prompt",
    "Scorer",
    "Task",
    "build_environment",
    "build_scorer",
    "load_task",
    "prepare_model_dir",
    "supervised_groups",
]
