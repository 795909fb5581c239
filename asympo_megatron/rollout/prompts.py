"""The prompts of a task, read in a thread: a source may generate its items, and a resumed run begins far behind the
first one. The controller answers calls meanwhile."""

import asyncio
from collections.abc import Sequence

from asympo_megatron.rollout.interfaces import Prompt, Task

_TRAIN_AT_ONCE = 256
_HELD_OUT_AT_ONCE = 32
"""Prompts of one call in the thread, which a controller that is told to stop waits for. Most items are for training."""


class Prompts:
    """One reader at a time: a task need not be safe for threads."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._reading = asyncio.Lock()
        self._known = 0
        self._held_out: Sequence[Prompt] | None = None

    async def train(self, index: int) -> Prompt:
        """See :meth:`~asympo_megatron.rollout.interfaces.Task.train_prompt`."""
        async with self._reading:
            for on_the_way in range(self._known + _TRAIN_AT_ONCE, index, _TRAIN_AT_ONCE):
                await asyncio.to_thread(self._task.train_prompt, on_the_way)
            self._known = max(self._known, index)
            return await asyncio.to_thread(self._task.train_prompt, index)

    async def held_out(self, limit: int) -> Sequence[Prompt]:
        """See :meth:`~asympo_megatron.rollout.interfaces.Task.eval_prompts`; the limit is the same at every call."""
        async with self._reading:
            if self._held_out is None:
                for fewer in range(_HELD_OUT_AT_ONCE, limit, _HELD_OUT_AT_ONCE):
                    await asyncio.to_thread(self._task.eval_prompts, fewer)
                self._held_out = await asyncio.to_thread(self._task.eval_prompts, limit)
            return self._held_out
