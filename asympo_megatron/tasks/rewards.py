"""From response ids to rewards: which scorer a configuration asks for, and what it may return."""

import math
from collections.abc import Sequence
from typing import Any

from asympo_megatron.config import Config
from asympo_megatron.errors import RewardError, TaskError, UnknownNameError
from asympo_megatron.tasks.codec import Codec
from asympo_megatron.tasks.functions import FunctionReward
from asympo_megatron.tasks.items import Prompt
from asympo_megatron.tasks.methods import Exact, Gym, History, InlineGym, Math, Method
from asympo_megatron.tasks.reasoning_gym import ReasoningGymSource
from asympo_megatron.tasks.task import Task
from asympo_megatron.tasks.workers import WorkerSpec

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


class Scorer:
    """Rewards of the responses to one prompt."""

    def __init__(self, codec: Codec, method: Method) -> None:
        self._codec = codec
        self._method = method

    async def score(
        self, prompt: Prompt, responses: Sequence[Sequence[int]], histories: Sequence[History] | None = None
    ) -> list[float]:
        """Score response ids, in their order.

        Args:
            prompt: what was asked.
            responses: ids of the last turn of each response.
            histories: the turns before it; None: all responses are of one turn.

        Raises:
            RewardError: the scorer failed after its retries, or returned something that is not one finite number a
                response.
        """
        try:
            texts = [self._codec.decode(ids) for ids in responses]
        except TaskError as error:
            raise RewardError(f"prompt {prompt.index}: {error}") from error
        before = [()] * len(texts) if histories is None else histories
        return checked(await self._method.score_episodes(prompt, texts, before), len(texts), prompt)

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
        return Scorer(task.codec, FunctionReward(settings))
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


def _runs_inline(source: ReasoningGymSource) -> bool:
    from reasoning_gym.dataset import ProceduralDataset

    default = type(source.dataset).score_answer is ProceduralDataset.score_answer
    return default or source.setup["name"] in INLINE
