"""From response ids to rewards.

Who is to blame when a scorer fails decides what happens. A scorer that raises over a response, or loses its worker over
it on every try, is run on the reference answer. If that works, the response is bad: reward 0, counted and logged. If it
fails too, the scorer is bad: RewardError. Nothing else becomes 0.
"""

import asyncio
import importlib
import inspect
import logging
import math
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import tenacity

from asympo_megatron.config import Config
from asympo_megatron.config.schema import TaskConfig
from asympo_megatron.errors import ConfigError, RewardError, TaskError, UnknownNameError
from asympo_megatron.tasks.codec import Codec
from asympo_megatron.tasks.items import Prompt
from asympo_megatron.tasks.judges import JudgeFault, ReasoningGymJudge
from asympo_megatron.tasks.reasoning_gym import ReasoningGymSource
from asympo_megatron.tasks.task import Task
from asympo_megatron.tasks.workers import Verdict, WorkerLostError, WorkerPool, WorkerRaisedError, WorkerSpec

_log = logging.getLogger(__name__)

BUILT_IN = ("task", "exact", "math")

INLINE = frozenset(
    {
        "ab", "chain_sum", "color_cube_rotation", "decimal_chain_sum", "dice", "emoji_mystery", "game_of_life_halting",
        "gsm_symbolic", "letter_jumble", "manipulate_matrix", "needle_haystack", "number_format",
        "palindrome_generation", "products", "sentence_reordering", "spell_backward", "word_sorting",
    }
)  # fmt: skip
"""reasoning-gym data sets whose own scorer was read and found cheap and free of evaluation (0.1.25). Those that use the
package's default scorer, a string comparison, run inline as well. Every other one scores in a fenced worker: at least
countdown, puzzle24, polynomial_multiplication, simple_integration, intermediate_integration, binary_matrix,
spiral_matrix, string_insertion and n_queens evaluate the answer as Python."""

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)

Texts = Sequence[str]
Score = Callable[[Prompt, Texts], Awaitable[list[float]]]


class Scorer:
    """Rewards of the responses to one prompt."""

    def __init__(self, codec: Codec, method: "Method") -> None:
        self._codec = codec
        self._method = method

    async def score(self, prompt: Prompt, responses: Sequence[Sequence[int]]) -> list[float]:
        """Score response ids, in their order.

        Raises:
            RewardError: the scorer failed after its retries, or returned something that is not one finite number a
                response.
        """
        try:
            texts = [self._codec.decode(ids) for ids in responses]
        except TaskError as error:
            raise RewardError(f"prompt {prompt.index}: {error}") from error
        return checked(await self._method.score(prompt, texts), len(texts), prompt)

    def metrics(self) -> dict[str, float]:
        """Counts since the start: reward/junk, reward/exhausted, reward/refused, reward/retries."""
        return {f"reward/{name}": float(count) for name, count in self._method.counts.items()}

    async def close(self) -> None:
        """End the reward workers."""
        await self._method.close()


def build_scorer(config: Config, task: Task) -> Scorer:
    """Make the scorer that task.reward names. No process starts before the first response needs one.

    Raises:
        UnknownNameError: no such reward; ConfigError: a function that cannot be imported or called.
    """
    settings, reward = config.task, config.task.reward
    if ":" in reward:
        return Scorer(task.codec, _function_method(settings))
    if reward not in BUILT_IN:
        raise UnknownNameError("reward (task.reward; a function is named pkg.mod:fn)", reward, BUILT_IN)
    own = task.source.own_reward if reward == "task" else reward
    if own == "exact":
        return Scorer(task.codec, Exact())
    if own == "math":
        return Scorer(task.codec, Math(WorkerSpec("math"), settings))
    assert isinstance(task.source, ReasoningGymSource)
    if _runs_inline(task.source):
        return Scorer(task.codec, InlineGym(task.source))
    return Scorer(task.codec, Gym(WorkerSpec("reasoning_gym", task.source.setup), settings))


def extract_answer(text: str) -> str:
    """The answer inside a response: the last ``<answer>...</answer>`` if there is one, else all of it, stripped."""
    tagged = _ANSWER.findall(text)
    return (tagged[-1] if tagged else text).strip()


def checked(rewards: Any, count: int, prompt: Prompt) -> list[float]:
    """Refuse anything but one finite number a response.

    Raises:
        RewardError: the message names the prompt and what came back.
    """
    where = f"rewards of prompt {prompt.index}"
    if not isinstance(rewards, list | tuple) or len(rewards) != count:
        size = f"{len(rewards)} values" if isinstance(rewards, list | tuple) else type(rewards).__name__
        raise RewardError(f"{where}: expected a list of {count} numbers, one a response, got {size}.")
    for row, value in enumerate(rewards):
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise RewardError(f"{where}: response {row} got {value!r}; a reward is a finite number.")
    return [float(value) for value in rewards]


class Method:
    """How texts become rewards; ``counts`` are what happened on the way."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter({"junk": 0, "exhausted": 0, "refused": 0, "retries": 0})

    async def score(self, prompt: Prompt, texts: Texts) -> list[float]:
        raise NotImplementedError

    async def close(self) -> None:
        return None


class Exact(Method):
    """1 if the extracted answer is the reference answer, white space apart."""

    async def score(self, prompt: Prompt, texts: Texts) -> list[float]:
        expected = prompt.answer.split()
        return [float(extract_answer(text).split() == expected) for text in texts]


class InlineGym(Method):
    """A reasoning-gym scorer from the allow-list, in this process."""

    def __init__(self, source: ReasoningGymSource) -> None:
        super().__init__()
        self._judge = ReasoningGymJudge(source.dataset)

    async def score(self, prompt: Prompt, texts: Texts) -> list[float]:
        return [self._score_one(prompt, extract_answer(text)) for text in texts]

    def _score_one(self, prompt: Prompt, text: str) -> float:
        try:
            return full_score(self._judge(gym_job(prompt, text)))
        except JudgeFault as error:
            raise RewardError(f"prompt {prompt.index}: {error}") from error
        except Exception as error:  # whatever a scorer raises over junk
            self._check_reference(prompt, error)
            self.counts["junk"] += 1
            _log.info("prompt %d: reward 0 for %r: the scorer raised %r", prompt.index, text[:200], error)
            return 0.0

    def _check_reference(self, prompt: Prompt, cause: Exception) -> None:
        if not prompt.answer:
            return
        try:
            self._judge(gym_job(prompt, prompt.answer))
        except Exception as error:
            raise RewardError(
                f"prompt {prompt.index}: the scorer raised {cause!r} and fails on the reference answer, too: {error!r}"
            ) from cause


class Pooled(Method):
    """One job a response in fenced workers."""

    def __init__(self, spec: WorkerSpec, settings: TaskConfig) -> None:
        super().__init__()
        self.pool = WorkerPool(spec, settings.reward_workers, settings.reward_timeout_s)
        self._tries = settings.reward_retries + 1

    async def close(self) -> None:
        await self.pool.close()

    def job(self, prompt: Prompt, text: str) -> dict[str, Any]:
        """Job of the worker for one response."""
        raise NotImplementedError

    def reference_job(self, prompt: Prompt) -> dict[str, Any] | None:
        """The same job for the reference answer, None where there is none."""
        raise NotImplementedError

    async def score(self, prompt: Prompt, texts: Texts) -> list[float]:
        return list(await asyncio.gather(*(self._score_one(prompt, text) for text in texts)))

    async def _score_one(self, prompt: Prompt, text: str) -> float:
        try:
            verdict = await self._call(self.job(prompt, text))
        except RewardError as error:
            raise RewardError(f"prompt {prompt.index}: {error}") from error
        except (WorkerRaisedError, WorkerLostError) as error:
            await self._check_reference(prompt, error)
            kind = "junk" if isinstance(error, WorkerRaisedError) else "exhausted"
            self.counts[kind] += 1
            _log.warning("prompt %d: reward 0 for %r (%s: %s)", prompt.index, text[:200], kind, error)
            return 0.0
        if verdict.refused:
            self.counts["refused"] += 1
            _log.warning("prompt %d: %r tried %s", prompt.index, text[:200], ", ".join(verdict.refused))
        return full_score(verdict.value)

    async def _check_reference(self, prompt: Prompt, cause: Exception) -> None:
        job = self.reference_job(prompt)
        if job is None:
            return
        try:
            await self._call(job)
        except (WorkerRaisedError, WorkerLostError, RewardError) as error:
            raise RewardError(
                f"prompt {prompt.index}: the scorer failed ({cause}) and fails on the reference answer "
                f"{prompt.answer!r}, too ({error}). Raise task.reward_timeout_s if the machine is busy."
            ) from cause

    async def _call(self, job: dict[str, Any]) -> Verdict:
        async for attempt in tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self._tries),
            retry=tenacity.retry_if_exception_type(WorkerLostError),
            before_sleep=lambda _: self.counts.update(retries=1),
            reraise=True,
        ):
            with attempt:
                return await self.pool.call(job)
        raise AssertionError("tenacity either returns or raises")


class Gym(Pooled):
    """A reasoning-gym scorer that is not on the allow-list."""

    def job(self, prompt: Prompt, text: str) -> dict[str, Any]:
        return gym_job(prompt, extract_answer(text))

    def reference_job(self, prompt: Prompt) -> dict[str, Any] | None:
        return gym_job(prompt, prompt.answer) if prompt.answer else None


class Math(Pooled):
    """Mathematical equality by math-verify."""

    def job(self, prompt: Prompt, text: str) -> dict[str, Any]:
        return {"gold": prompt.answer, "text": extract_answer(text), "tagged": bool(_ANSWER.search(text))}

    def reference_job(self, prompt: Prompt) -> dict[str, Any] | None:
        return {"gold": prompt.answer, "text": prompt.answer, "tagged": True}


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


def full_score(score: float) -> float:
    """1 for a full score, else 0: data sets give partial credit (0.5 for "77" where 7 is right) that is no reward."""
    if not math.isfinite(score):
        raise RewardError(f"the data set's scorer returned {score}; a score is a finite number.")
    return 1.0 if score >= 1.0 else 0.0


def gym_job(prompt: Prompt, text: str) -> dict[str, Any]:
    """Job of :class:`asympo_megatron.tasks.judges.ReasoningGymJudge`."""
    return {"index": prompt.meta["source_index"], "question": prompt.question, "text": text}


def _runs_inline(source: ReasoningGymSource) -> bool:
    from reasoning_gym.dataset import ProceduralDataset

    default = type(source.dataset).score_answer is ProceduralDataset.score_answer
    return default or source.setup["name"] in INLINE


def _function_method(settings: TaskConfig) -> Function:
    function = resolve(settings.reward)
    wait = tenacity.wait_random_exponential(multiplier=0.2, max=10)
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
        return AsyncFunction(settings, wait, function)
    return SyncFunction(settings, wait)


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
