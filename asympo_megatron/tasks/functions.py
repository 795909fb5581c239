"""Functions of the user, by import path ``pkg.mod:fn``, and rewards by one.

    fn(prompts, responses, answers, metas) -> one finite number a response

Four lists of one length: texts of prompt, response (its last turn) and reference answer, and the rest of the data set's
row with the turns before under "episode". A failed call is tried again; a function that keeps failing is an error,
never a 0.
"""

import asyncio
import importlib
import inspect
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import tenacity

from asympo_megatron.config.rollout_schema import TaskConfig
from asympo_megatron.errors import AsympoError, ConfigError, RewardError, UnknownNameError
from asympo_megatron.tasks.items import Prompt
from asympo_megatron.tasks.methods import History, Method, Texts
from asympo_megatron.tasks.workers import WorkerPool, WorkerSpec

_log = logging.getLogger(__name__)


def resolve(target: str, key: str) -> Callable[..., Any]:
    """Import ``pkg.mod:fn``, the value of the configuration's ``key``.

    Raises:
        ConfigError: the module cannot be imported or holds no such callable; the message says which.
    """
    module_name, _, name = target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a module may raise anything when imported
        raise ConfigError(
            f"{key}={target}: module {module_name!r} cannot be imported ({type(error).__name__}: {error}). "
            "Install it or add its folder to PYTHONPATH."
        ) from error
    function = getattr(module, name, None)
    if function is None:
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UnknownNameError(f"function of module {module_name} ({key})", name, names)
    if not callable(function):
        raise ConfigError(f"{key}={target} is {type(function).__name__}; expected a function.")
    return function


class Function:
    """A function of the user: retried, and an error when it keeps failing.

    Args:
        what: names it in messages.
        target: its import path.
        settings: limits of time, tries and processes.
        error: what a function that keeps failing raises.
    """

    def __init__(self, what: str, target: str, settings: TaskConfig, error: type[AsympoError]) -> None:
        self.retries = 0
        self.wait: Any = tenacity.wait_random_exponential(multiplier=0.2, max=10)
        self._name = f"{what} {target}"
        self._tries = settings.reward_retries + 1
        self._timeout_s = settings.reward_timeout_s
        self._error = error

    async def run(self, prompt: Prompt, arguments: list[Any]) -> Any:
        """Call the function on behalf of a prompt; arguments and result are JSON values."""
        try:
            async for attempt in tenacity.AsyncRetrying(
                stop=tenacity.stop_after_attempt(self._tries),
                wait=self.wait,
                retry=tenacity.retry_if_exception_type(Exception),
                before_sleep=self._note_retry,
                reraise=True,
            ):
                with attempt:
                    return await self.call(arguments)
        except Exception as error:  # a user's function raises what it likes
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise self._error(
                f"{self._name} failed on prompt {prompt.index} in {self._tries} tries "
                f"(task.reward_retries), the last time by {reason}"
            ) from error
        raise AssertionError("tenacity either returns or raises")

    async def call(self, arguments: list[Any]) -> Any:
        """Run the function once."""
        raise NotImplementedError

    async def close(self) -> None:
        """End its processes."""

    def _note_retry(self, state: tenacity.RetryCallState) -> None:
        self.retries += 1
        assert state.outcome is not None
        _log.warning("%s failed and is tried again: %r", self._name, state.outcome.exception())


class AsyncFunction(Function):
    """An async function: runs on the controller's event loop, which it must not block."""

    def __init__(
        self,
        what: str,
        target: str,
        settings: TaskConfig,
        error: type[AsympoError],
        function: Callable[..., Awaitable[Any]],
    ) -> None:
        super().__init__(what, target, settings, error)
        self._function = function

    async def call(self, arguments: list[Any]) -> Any:
        try:
            result = await asyncio.wait_for(self._function(*arguments), self._timeout_s)
        except TimeoutError:
            raise TimeoutError(f"no result within task.reward_timeout_s={self._timeout_s:g} s") from None
        return result.tolist() if hasattr(result, "tolist") else result


class SyncFunction(Function):
    """A plain function: runs in worker processes, so that it can hang or die alone."""

    def __init__(self, what: str, target: str, settings: TaskConfig, error: type[AsympoError]) -> None:
        super().__init__(what, target, settings, error)
        spec = WorkerSpec("function", {"target": target}, fenced=False)
        self.pool = WorkerPool(spec, settings.reward_workers, settings.reward_timeout_s)

    async def call(self, arguments: list[Any]) -> Any:
        return (await self.pool.call({"arguments": arguments})).value

    async def close(self) -> None:
        await self.pool.close()


def open_function(key: str, what: str, target: str, settings: TaskConfig, error: type[AsympoError]) -> Function:
    """The function at an import path; an async one stays in this process, a plain one gets workers.

    Raises:
        ConfigError: the value of ``key`` cannot be imported or called.
    """
    function = resolve(target, key)
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
        return AsyncFunction(what, target, settings, error, function)
    return SyncFunction(what, target, settings, error)


class FunctionReward(Method):
    """Rewards by a user's function, called once for a group."""

    def __init__(self, settings: TaskConfig) -> None:
        super().__init__()
        self.function = open_function("task.reward", "reward function", settings.reward, settings, RewardError)

    async def score(self, prompt: Prompt, texts: Texts) -> list[float]:
        return await self.score_episodes(prompt, texts, [()] * len(texts))

    async def score_episodes(self, prompt: Prompt, texts: Texts, histories: Sequence[History]) -> list[float]:
        count = len(texts)
        metas = [told(prompt, history) for history in histories]
        try:
            return await self.function.run(
                prompt, [[prompt.question] * count, list(texts), [prompt.answer] * count, metas]
            )
        finally:
            self.counts["retries"] = self.function.retries

    async def close(self) -> None:
        await self.function.close()


def told(prompt: Prompt, history: History) -> dict[str, Any]:
    """What a function is told beside texts: the row of the data set, and the turns of the response so far."""
    return {**prompt.meta, "episode": [list(pair) for pair in history]}
