"""Environments of the user, by import path ``pkg.mod:fn``: what replies to the model's turns.

    fn(prompt, response, answer, meta) -> text of the reply, or None: the episode is over

The four arguments of a reward function, for one response: ``response`` is the text of its last turn, and
``meta["episode"]`` holds the (turn, reply) pairs before it. The function keeps no state of its own, so a failed call is
tried again, and a group whose controller died is played again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from asympo_megatron.config import Config
from asympo_megatron.errors import EpisodeError, TaskError
from asympo_megatron.tasks.codec import Codec
from asympo_megatron.tasks.functions import Function, open_function, told
from asympo_megatron.tasks.items import Prompt
from asympo_megatron.tasks.methods import History
from asympo_megatron.tasks.task import Task


@dataclass(frozen=True)
class Reply:
    """A reply to a turn.

    Args:
        turn: text of the turn.
        text: what the environment said.
        ids: what follows the turn's ids: the reply as the chat template frames it.
    """

    turn: str
    text: str
    ids: list[int]


class Environment:
    """A user's function between the turns of the model."""

    def __init__(self, codec: Codec, function: Function) -> None:
        self._codec, self._function = codec, function

    async def reply(self, prompt: Prompt, turn: Sequence[int], history: History) -> Reply | None:
        """The reply to the ids of a turn; None: the episode is over.

        Raises:
            EpisodeError: the function failed after its retries, or returned what cannot be told to the model.
        """
        try:
            said = self._codec.decode(turn)
            text = await self._function.run(prompt, [prompt.question, said, prompt.answer, told(prompt, history)])
            if text is None:
                return None
            if not isinstance(text, str):
                raise TaskError(f"expected a text or None, got {type(text).__name__}")
            return Reply(said, text, self._codec.encode_reply(turn, text))
        except TaskError as error:
            raise EpisodeError(f"reply of the environment to prompt {prompt.index}: {error}") from error

    async def close(self) -> None:
        """End the worker processes."""
        await self._function.close()


def build_environment(config: Config, task: Task) -> Environment | None:
    """Make the environment that task.environment names, None where it names none. No process starts before the first
    turn needs one.

    Raises:
        ConfigError: the function cannot be imported or called.
        TaskError: the chat template has no place for replies.
    """
    settings = config.task
    if settings.environment is None:
        return None
    task.codec.render_reply("")  # a template that refuses the role says so now
    return Environment(
        task.codec, open_function("task.environment", "environment", settings.environment, settings, EpisodeError)
    )
