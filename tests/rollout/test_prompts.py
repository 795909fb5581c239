"""Prompts are read beside the controller's work: slow sources, resumes far behind the first prompt."""

import asyncio
import threading
from pathlib import Path
from typing import Any

from rollout_world import FakePrompt, FakeTask, run_async, small_config, world

from asympo_megatron.rollout.prompts import Prompts


def test_calls_are_answered_while_a_prompt_is_read(tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    class Slow(FakeTask):
        def train_prompt(self, index: int) -> FakePrompt:
            begun.set()
            assert go_on.wait(120)
            return super().train_prompt(index)

    async def scenario() -> None:
        async with world(tmp_path, small_config(), task=Slow()) as w:
            await w.trainer.attach()
            await w.trainer.publish(0)
            assert await asyncio.to_thread(begun.wait, 120)
            try:
                assert not (await w.trainer.lease(0, wait_s=0.0)).ready
            finally:
                go_on.set()
            assert (await w.trainer.lease(0)).ready

    run_async(scenario())


class Recorded:
    """Notes what it is asked for, and that nobody else asks meanwhile."""

    codec: Any = None

    def __init__(self) -> None:
        self.asked: list[int] = []
        self._alone = threading.Lock()

    def train_prompt(self, index: int) -> FakePrompt:
        assert self._alone.acquire(blocking=False)
        self.asked.append(index)
        self._alone.release()
        return FakePrompt(index, [index])

    def eval_prompts(self, limit: int) -> list[FakePrompt]:
        return [self.train_prompt(limit)] * limit


def test_a_long_way_is_walked_in_parts_once() -> None:
    async def scenario() -> None:
        task = Recorded()
        prompts = Prompts(task)
        found = await asyncio.gather(*(prompts.train(index) for index in (1000, 1001, 3)))
        assert [prompt.index for prompt in found] == [1000, 1001, 3]
        assert task.asked == [256, 512, 768, 1000, 1001, 3]

    run_async(scenario())


def test_held_out_prompts_are_read_once() -> None:
    async def scenario() -> None:
        task = Recorded()
        prompts = Prompts(task)
        first, again, _ = await asyncio.gather(prompts.held_out(70), prompts.held_out(70), prompts.train(0))
        assert len(first) == 70
        assert first is again
        assert task.asked == [32, 64, 70, 0]

    run_async(scenario())
