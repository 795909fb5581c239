"""Rewards of one's own: `task.reward=rewards:brevity`, with this folder in PYTHONPATH."""

from collections.abc import Mapping, Sequence
from typing import Any


def brevity(
    prompts: Sequence[str], responses: Sequence[str], answers: Sequence[str], metas: Sequence[Mapping[str, Any]]
) -> list[float]:
    """1 for a response that names the answer, and up to 0.5 for one that is short: never the same for a whole group."""
    return [
        float(answer.lower() in response.lower()) + 0.5 / (1 + len(response))
        for response, answer in zip(responses, answers, strict=True)
    ]
