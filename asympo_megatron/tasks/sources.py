"""Which source a task section names."""

from asympo_megatron.config.rollout_schema import TaskConfig
from asympo_megatron.errors import TaskError
from asympo_megatron.tasks.items import Source
from asympo_megatron.tasks.jsonl import JsonlSource
from asympo_megatron.tasks.reasoning_gym import ReasoningGymSource


def open_source(task: TaskConfig) -> Source:
    """Open the data of a task section.

    Raises:
        TaskError: the data cannot be read; UnknownNameError: no such data set or option.
    """
    if task.size < 1:
        raise TaskError(f"task.size is {task.size}; a task has at least one prompt.")
    if task.kind == "jsonl":
        return JsonlSource(task, task.path or "")
    return ReasoningGymSource(task)
