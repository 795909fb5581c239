"""Procedural tasks of reasoning-gym (extra ``tasks``), by the name of the data set."""

import dataclasses
import os
from typing import Any

from asympo_megatron.config.rollout_schema import TaskConfig
from asympo_megatron.errors import TaskError, UnknownNameError
from asympo_megatron.tasks.items import Item

OWN_OPTIONS = ("size", "seed")
"""Options that come from the task section itself."""

HASH_DEPENDENT = frozenset(
    {"isomorphic_strings", "knight_swap", "list_functions", "polynomial_multiplication", "ransom_note", "word_ladder"}
)
"""Data sets (reasoning-gym 0.1.25) that iterate over sets of strings: their questions or reference answers differ from
one process to the next unless PYTHONHASHSEED is fixed, and a resumed run would see other prompts."""


class ReasoningGymSource:
    """Items 0 .. task.size - 1 of one data set; item i is a function of (name, options, task.seed, i)."""

    own_reward = "reasoning_gym"

    def __init__(self, task: TaskConfig) -> None:
        self.name = f"reasoning_gym {task.name}"
        self.setup = {"name": task.name, "options": {**task.options, "size": task.size, "seed": task.seed}}
        self._size = task.size
        self.dataset = _create(task)

    def __len__(self) -> int:
        return self._size

    def item(self, position: int) -> Item:
        try:
            entry = self.dataset[position]
        except Exception as error:  # each of its 106 generators raises its own kinds
            raise TaskError(
                f"{self.name}: item {position} of {self._size} cannot be made ({type(error).__name__}: {error}). "
                "Lower task.size or change task.options."
            ) from error
        answer = entry["answer"]
        return Item(
            question=entry["question"],
            answer=None if answer is None else str(answer),
            meta={"source_index": position},
        )


def _create(task: TaskConfig) -> Any:
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise TaskError(
            f"task.kind=reasoning_gym needs the package reasoning-gym, which is not installed ({error}). "
            "Install the extra: pip install 'asympo-megatron[tasks]'."
        ) from error
    if task.name not in DATASETS:
        raise UnknownNameError("reasoning_gym data set (task.name)", task.name, DATASETS)
    known = [field.name for field in dataclasses.fields(DATASETS[task.name][1]) if field.name not in OWN_OPTIONS]
    for option in task.options:
        if option in OWN_OPTIONS:
            raise TaskError(f"task.options.{option}: set task.{option} instead.")
        if option not in known:
            raise UnknownNameError(f"option of reasoning_gym {task.name} (task.options)", str(option), known)
    if task.name in HASH_DEPENDENT and not os.environ.get("PYTHONHASHSEED", "").isdigit():
        raise TaskError(
            f"the items of reasoning_gym {task.name} depend on Python's hash seed, which differs in every process. "
            "Set PYTHONHASHSEED=0 for all roles of the run."
        )
    try:
        return create_dataset(task.name, size=task.size, seed=task.seed, **task.options)
    except Exception as error:  # its validators use assert, others raise ValueError
        raise TaskError(f"reasoning_gym {task.name} refuses task.options {task.options}: {error}") from error
