"""Groups of reference answers for supervised steps, with label noise on demand."""

from collections.abc import Sequence
from random import Random

from asympo_megatron.config import Config
from asympo_megatron.errors import TaskError
from asympo_megatron.records import Group, Response
from asympo_megatron.tasks.task import Task


def supervised_groups(config: Config, task: Task, step: int) -> list[Group]:
    """The reference answers that step ``step`` trains on: one group of one response a prompt.

    A label is the reference answer and the end token, all of it trained. Each of its tokens except the end token is
    replaced with probability rollout.label_noise by a token drawn evenly from the answer alphabet. Everything depends
    on (configuration, step) only, so a resumed run sees the same labels.
    """
    noise = config.rollout.label_noise
    alphabet = task.answer_alphabet if noise > 0 else ()
    rng = Random(f"labels/{config.run.seed}/{step}")
    size = config.batch.groups_per_step
    groups = []
    for index in range(step * size, (step + 1) * size):
        prompt, label = task.train_example(index)
        ids = [*with_noise(label[:-1], noise, alphabet, rng), label[-1]]
        response = Response(ids=ids, mask=[1] * len(ids), reward=1.0)
        groups.append(Group(prompt_ids=prompt.ids, responses=[response], group_id=index, prompt_index=index))
    return groups


def with_noise(ids: Sequence[int], noise: float, alphabet: Sequence[int], rng: Random) -> list[int]:
    """Replace each id with probability ``noise`` by one of the alphabet."""
    if noise > 0 and not alphabet:
        raise TaskError("rollout.label_noise needs reference answers to draw letters from; this task has none.")
    return [rng.choice(alphabet) if rng.random() < noise else token for token in ids]
