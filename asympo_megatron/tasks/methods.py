"""How texts become rewards: comparison, reasoning-gym scorers, math-verify.

Who is to blame when a scorer fails decides what happens. A scorer that raises over a response, or loses its worker over
it on every try, is run on the reference answer. If that works, the response is bad: reward 0, counted and logged. If it
fails too, the scorer is bad: RewardError. Nothing else becomes 0.
"""

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import tenacity

from asympo_megatron.config.rollout_schema import TaskConfig
from asympo_megatron.errors import RewardError
from asympo_megatron.tasks.items import Prompt
from asympo_megatron.tasks.jsonl import last_boxed
from asympo_megatron.tasks.judges import JudgeFault, ReasoningGymJudge
from asympo_megatron.tasks.reasoning_gym import ReasoningGymSource
from asympo_megatron.tasks.workers import Verdict, WorkerLostError, WorkerPool, WorkerRaisedError, WorkerSpec

_log = logging.getLogger(__name__)

_OPEN, _CLOSE = "<answer>", "</answer>"

Texts = Sequence[str]
History = Sequence[tuple[str, str]]
"""The turns of a response before its last one, each with the reply of the environment to it."""


def extract_answer(text: str) -> str:
    """The answer inside a response: the last ``<answer>...</answer>`` if there is one, else all of it, stripped."""
    tagged = _last_tagged(text)
    return (text if tagged is None else tagged).strip()


def _last_tagged(text: str) -> str | None:
    """What ``<answer>(.*?)</answer>`` finds last, in one pass: a regular expression takes quadratic time on a response
    that repeats the opening tag."""
    end = text.rfind(_CLOSE)
    while end >= 0:
        before = text.rfind(_CLOSE, 0, end)
        begin = text.find(_OPEN, max(before, 0), end)
        if begin >= 0:
            return text[begin + len(_OPEN) : end]
        end = before
    return None


class Method:
    """How texts become rewards; ``counts`` are what happened on the way."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter({"junk": 0, "exhausted": 0, "refused": 0, "retries": 0})

    async def score(self, prompt: Prompt, texts: Texts) -> list[float]:
        raise NotImplementedError

    async def score_episodes(self, prompt: Prompt, texts: Texts, histories: Sequence[History]) -> list[float]:
        """Score responses by the texts of their last turns, where the final answer is; what came before is told to
        functions of the user alone."""
        return await self.score(prompt, texts)

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
        jobs = (self._score_one(prompt, text) for text in texts)
        results = await asyncio.gather(*jobs, return_exceptions=True)  # every job ends before an error goes up
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return [result for result in results if isinstance(result, float)]

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
    r"""math-verify on the last ``<answer>``, else the last ``\boxed{}``, else what it finds in the text."""

    def job(self, prompt: Prompt, text: str) -> dict[str, Any]:
        tagged = _last_tagged(text)
        marked = last_boxed(text) if tagged is None else tagged.strip()
        return {"gold": prompt.answer, "text": text if marked is None else marked, "marked": marked is not None}

    def reference_job(self, prompt: Prompt) -> dict[str, Any] | None:
        return {"gold": prompt.answer, "text": prompt.answer, "marked": True}


def full_score(score: float) -> float:
    """1 for a full score, else 0: data sets give partial credit (0.5 for "77" where 7 is right) that is no reward."""
    if not math.isfinite(score):
        raise RewardError(f"the data set's scorer returned {score}; a score is a finite number.")
    return 1.0 if score >= 1.0 else 0.0


def gym_job(prompt: Prompt, text: str) -> dict[str, Any]:
    """Job of :class:`asympo_megatron.tasks.judges.ReasoningGymJudge`."""
    return {"index": prompt.meta["source_index"], "question": prompt.question, "text": text}
