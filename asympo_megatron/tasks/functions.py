"""Reward functions of the user, by import path ``pkg.mod:fn``.

    fn(prompts, responses, answers, metas) -> one finite number a response

Four lists of one length: texts of prompt, response and reference answer, and the rest of the data set's row. A failed
call is tried again; a function that keeps failing is a RewardError, never a 0.
"""

import asyncio
import importlib
import inspect
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import tenacity

from asympo_megatron.config.schema import TaskConfig
from asympo_megatron.errors import ConfigError, RewardError, UnknownNameError
from asympo_megatron.tasks.items import Prompt
from asympo_megatron.tasks.methods import Method, Texts
from asympo_megatron.tasks.workers import WorkerPool, WorkerSpec

_log = logging.getLogger(__name__)


def resolve(target: str) -> Callable[..., Any]:
    """Import ``pkg.mod:fn``.

    Raises:
        ConfigError: the module cannot be imported or holds no such callable; the message says which.
    """
    module_name, _, name = target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a module may raise anything when imported
        raise ConfigError(
            f"task.reward={target}: module {module_name!r} cannot be imported ({type(error).__name__}: {error}). "
            "Install it or add its folder to PYTHONPATH."
        ) from error
    function = getattr(module, name, None)
    if function is None:
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UnknownNameError(f"function of module {module_name} (task.reward)", name, names)
    if not callable(function):
        raise ConfigError(f"task.reward={target} is {type(function).__name__}; expected a function.")
    return function


class Function(Method):
    """A user's function, batched over the group; retried, and a RewardError when it keeps failing."""

    def __init__(self, settings: TaskConfig, wait: Any) -> None:
        super().__init__()
        self._name = settings.reward
        self._tries = settings.reward_retries + 1
        self._wait = wait

    async def call(self, job: dict[str, Any]) -> Any:
        """Run the function once."""
        raise NotImplementedError

    async def score(self, prompt: Prompt, texts: Texts) -> list[float]:
        count = len(texts)
        job = {
            "prompts": [prompt.question] * count,
            "responses": list(texts),
            "answers": [prompt.answer] * count,
            "metas": [prompt.meta] * count,
        }
        try:
            async for attempt in tenacity.AsyncRetrying(
                stop=tenacity.stop_after_attempt(self._tries),
                wait=self._wait,
                retry=tenacity.retry_if_exception_type(Exception),
                before_sleep=self._note_retry,
                reraise=True,
            ):
                with attempt:
                    return await self.call(job)
        except Exception as error:  # a user's function raises what it likes
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise RewardError(
                f"reward function {self._name} failed on prompt {prompt.index} in {self._tries} tries "
                f"(task.reward_retries), the last time by {reason}"
            ) from error
        raise AssertionError("tenacity either returns or raises")

    def _note_retry(self, state: tenacity.RetryCallState) -> None:
        self.counts["retries"] += 1
        assert state.outcome is not None
        _log.warning("reward function %s failed and is tried again: %r", self._name, state.outcome.exception())


class AsyncFunction(Function):
    """An async function: runs on the controller's event loop, which it must not block."""

    def __init__(self, settings: TaskConfig, wait: Any, function: Callable[..., Awaitable[Any]]) -> None:
        super().__init__(settings, wait)
        self._function = function
        self._timeout_s = settings.reward_timeout_s

    async def call(self, job: dict[str, Any]) -> Any:
        call = self._function(job["prompts"], job["responses"], job["answers"], job["metas"])
        try:
            result = await asyncio.wait_for(call, self._timeout_s)
        except TimeoutError:
            raise TimeoutError(f"no result within task.reward_timeout_s={self._timeout_s:g} s") from None
        return result.tolist() if hasattr(result, "tolist") else result


class SyncFunction(Function):
    """A plain function: runs in worker processes, so that it can hang or die alone."""

    def __init__(self, settings: TaskConfig, wait: Any) -> None:
        super().__init__(settings, wait)
        spec = WorkerSpec("function", {"target": settings.reward}, fenced=False)
        self.pool = WorkerPool(spec, settings.reward_workers, settings.reward_timeout_s)

    async def call(self, job: dict[str, Any]) -> Any:
        return (await self.pool.call(job)).value

    async def close(self) -> None:
        await self.pool.close()


def function_method(settings: TaskConfig) -> Function:
    """The method for task.reward=pkg.mod:fn; an async function stays in this process, a plain one gets workers."""
    function = resolve(settings.reward)
    wait = tenacity.wait_random_exponential(multiplier=0.2, max=10)
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
        return AsyncFunction(settings, wait, function)
    return SyncFunction(settings, wait)
