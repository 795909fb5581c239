"""What the controller needs of a task and a scorer; ``asympo_megatron.tasks`` provides both."""

from collections.abc import Sequence
from typing import Any, Protocol

History = Sequence[tuple[str, str]]
"""The turns of a response before its last one, each with the reply to it."""


class Prompt(Protocol):
    """One prompt of a task, already token ids."""

    @property
    def index(self) -> int: ...
    @property
    def ids(self) -> Sequence[int]: ...
    @property
    def question(self) -> str: ...
    @property
    def answer(self) -> Any: ...
    @property
    def meta(self) -> Any: ...


class Codec(Protocol):
    """The token ids of a task."""

    @property
    def stop_token_ids(self) -> Sequence[int]: ...
    @property
    def vocab_size(self) -> int: ...


class Task(Protocol):
    """A source of prompts. Training prompts are numbered from 0 without end; held-out ones are never among them."""

    @property
    def codec(self) -> Codec: ...
    def train_prompt(self, index: int) -> Prompt: ...
    def eval_prompts(self, limit: int) -> Sequence[Prompt]: ...


class Scorer(Protocol):
    """Rewards of the responses to one prompt, in their order; raises RewardError rather than guessing. ``responses``
    are the ids of their last turns; ``histories`` what came before, given where the task has an environment."""

    async def score(
        self, prompt: Any, responses: list[list[int]], histories: list[History] | None = None
    ) -> list[float]: ...
    def metrics(self) -> dict[str, float]: ...


class Reply(Protocol):
    """A reply of an environment: texts of the turn and of the reply, and the ids that follow the turn."""

    @property
    def turn(self) -> str: ...
    @property
    def text(self) -> str: ...
    @property
    def ids(self) -> list[int]: ...


class Environment(Protocol):
    """Replies to turns, None where the episode is over; raises EpisodeError rather than guessing."""

    async def reply(self, prompt: Any, turn: list[int], history: History) -> Reply | None: ...
