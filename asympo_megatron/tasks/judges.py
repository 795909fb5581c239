"""Scorers of model output. Standard library only at import: reward workers load this file by its path.

A judge is called with a JSON object and returns a JSON value. What it raises is attributed by the caller
(:mod:`asympo_megatron.tasks.rewards`); :class:`JudgeFault` is never the response's doing.
"""

import asyncio
import importlib
import inspect
import logging
from collections.abc import Callable
from typing import Any

Judge = Callable[[dict[str, Any]], Any]


class JudgeFault(Exception):
    """A failure that no response can cause."""


def build(kind: str, setup: dict[str, Any]) -> Judge:
    """Make the judge of a worker: reasoning_gym | math | function."""
    if kind == "reasoning_gym":
        from reasoning_gym.factory import create_dataset

        return ReasoningGymJudge(create_dataset(setup["name"], **setup["options"]))
    if kind == "math":
        return MathJudge()
    return FunctionJudge(setup["target"])


class ReasoningGymJudge:
    """Raw score of a text by the data set's own scorer: {"index", "question", "text"} -> float."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __call__(self, job: dict[str, Any]) -> float:
        entry = self._dataset[job["index"]]  # made anew for every job: some scorers write into it
        if entry["question"] != job["question"]:
            raise JudgeFault(f"item {job['index']} of the data set is another question in this process.")
        return float(self._dataset.score_answer(job["text"], entry))


class MathJudge:
    r"""math-verify: {"gold", "text", "marked"} -> 1.0 if equal, else 0.0.

    The reference answer and a marked text are taken as one expression; in any other text math-verify looks for one (a
    "final answer", else the last expression). Its own time limits need SIGALRM on the main thread and are off: the
    worker as a whole is limited.
    """

    def __init__(self) -> None:
        logging.getLogger("math_verify").setLevel(logging.CRITICAL)
        import math_verify

        self._parse = math_verify.parse
        self._verify = math_verify.verify
        self({"gold": r"\frac{1}{2}", "text": "0.5", "marked": True})  # builds its grammars before any clock runs

    def __call__(self, job: dict[str, Any]) -> float:
        gold = self._expressions(_as_expression(job["gold"]))
        if not gold:
            raise JudgeFault(f"math-verify finds no expression in the reference answer {job['gold']!r}.")
        found = self._expressions(_as_expression(job["text"]) if job["marked"] else job["text"])
        return float(self._verify(gold, found, timeout_seconds=None, raise_on_error=True))

    def _expressions(self, text: str) -> list[Any]:
        return self._parse(text, parsing_timeout=None, raise_on_error=True)


def _as_expression(text: str) -> str:
    return text if "\\boxed" in text or "$" in text else f"\\boxed{{{text}}}"


class FunctionJudge:
    """A user's function: {"arguments"} -> what it returns."""

    def __init__(self, target: str) -> None:
        module, _, name = target.partition(":")
        self._function = getattr(importlib.import_module(module), name)

    def __call__(self, job: dict[str, Any]) -> Any:
        result = self._function(*job["arguments"])
        if inspect.isawaitable(result):
            return asyncio.run(_await(result))
        return result.tolist() if hasattr(result, "tolist") else result


async def _await(value: Any) -> Any:
    return await value
