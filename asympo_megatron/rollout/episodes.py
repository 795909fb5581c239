"""A response of several turns: the model speaks, the environment replies, until one of them ends it.

    prompt │ turn ► reply ► turn ► reply ► turn      one response; turns are trained (mask 1), replies are not (mask 0)

Every turn is one request of its own, under the lag rule and with the retries of any other. What an engine returned is
never tokenised again: the next turn is asked for with exactly the ids that the trainer will see.
"""

import asyncio
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from asympo_megatron.records import VersionSpan
from asympo_megatron.rollout.interfaces import Environment, History, Prompt
from asympo_megatron.rollout.requester import Draft, Requester, Sampled

_Result = TypeVar("_Result")
OUT_OF_TURNS = "turns"
"""finish_reason of a response that task.max_turns ended: the environment would have replied once more."""


@dataclass(frozen=True)
class Episode:
    """A complete response.

    Args:
        ids, mask: turns and replies; the mask is 1 for tokens that the model sampled.
        versions: weight versions of the turns' tokens; replies belong to none.
        logprobs: behavior log-probs, 0 for tokens of replies; or None.
        finish_reason: of the last turn, or "turns".
        last_turn: ids of the last turn.
        history: (turn, reply) texts before it; None where the task has no environment.
        turns: of the model.
    """

    ids: list[int]
    mask: list[int]
    versions: list[VersionSpan]
    logprobs: list[float] | None
    finish_reason: str
    last_turn: list[int]
    history: History | None = None
    turns: int = 1


class Player:
    """Plays responses to their end.

    Args:
        requester: samples turns.
        environment: replies to them; None: a response is one turn.
        max_turns: of the model in one response.
    """

    def __init__(self, requester: Requester, environment: Environment | None, max_turns: int) -> None:
        self._requester, self._environment, self._max_turns = requester, environment, max_turns

    async def play(self, prompt: Prompt, draft: Draft) -> Episode:
        """Play one response. Its turns and replies together stay within the draft's max_new_tokens: a reply after
        which the model could not say a word is not given, and the response ends as truncated.

        Raises:
            EpisodeError: the environment failed.
            ControllerError: an engine says that the request itself is wrong.
        """
        turn = await self._requester.sample(draft)
        if self._environment is None:
            mask = [1] * len(turn.ids)
            return Episode(turn.ids, mask, turn.versions, turn.logprobs, turn.finish_reason, turn.ids)
        story = _Story(turn)
        while turn.finish_reason == "stop":
            reply = await self._environment.reply(prompt, turn.ids, story.history)
            if reply is None:
                break
            if len(story.history) + 1 == self._max_turns:
                return story.end(turn, OUT_OF_TURNS)
            left = draft.params.max_new_tokens - len(story.ids) - len(reply.ids)
            if left < 1:
                return story.end(turn, "length")
            story.add_reply(reply.turn, reply.text, reply.ids)
            turn = await self._requester.sample(story.next_turn(draft, left))
            story.add_turn(turn)
        return story.end(turn, turn.finish_reason)


class _Story:
    """Turns and replies so far."""

    def __init__(self, first: Sampled) -> None:
        self.ids: list[int] = []
        self.history: list[tuple[str, str]] = []
        self._mask: list[int] = []
        self._versions: list[VersionSpan] = []
        self._logprobs: list[float] | None = None if first.logprobs is None else []
        self._requests = 0
        self.add_turn(first)

    def add_turn(self, turn: Sampled) -> None:
        start = len(self.ids)
        self._versions += [VersionSpan(span.version, span.start + start, span.end + start) for span in turn.versions]
        self._add(turn.ids, 1, turn.logprobs or [])
        self._requests += turn.requests

    def add_reply(self, turn: str, text: str, ids: list[int]) -> None:
        self.history.append((turn, text))
        self._add(ids, 0, [0.0] * len(ids))

    def _add(self, ids: list[int], trained: int, logprobs: list[float]) -> None:
        self.ids = self.ids + ids  # a new list: a request may still hold the old one
        self._mask += [trained] * len(ids)
        if self._logprobs is not None:
            self._logprobs += logprobs

    def next_turn(self, draft: Draft, left: int) -> Draft:
        params = msgspec.structs.replace(draft.params, max_new_tokens=left)
        prompt_ids = draft.prompt_ids + self.ids
        return msgspec.structs.replace(draft, prompt_ids=prompt_ids, params=params, requests=self._requests)

    def end(self, turn: Sampled, reason: str) -> Episode:
        turns = len(self.history) + 1
        return Episode(self.ids, self._mask, self._versions, self._logprobs, reason, turn.ids, self.history, turns)


async def all_or_none(work: Iterable[Coroutine[Any, Any, _Result]]) -> list[_Result]:
    """The results in order. The first failure ends the rest, on the engines as well: nobody waits for it any more."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
