"""What a task is made of: items as the data set holds them, prompts as the engines get them."""

import hashlib
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Item:
    """One question of a data set, before any tokenizer.

    Args:
        question: text, or chat messages (role, content).
        answer: reference answer that rewards compare with; None where the data set has none.
        label: text of the supervised label where it is longer than the answer (a worked solution); None: the answer.
        meta: handed to reward functions.
    """

    question: str | Messages
    answer: str | None
    label: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The question as one text: what identifies the item."""
        if isinstance(self.question, str):
            return self.question
        return "\n\n".join(message["content"] for message in self.question)

    @property
    def label_text(self) -> str | None:
        """Text of the supervised label."""
        return self.answer if self.label is None else self.label


class Prompt(msgspec.Struct, frozen=True):
    """One prompt, ready to be sampled from."""

    index: int
    """Position in the training order, or among the held-out prompts."""
    ids: list[int]
    question: str
    answer: str
    """Reference answer; empty where the data set has none (its own scorer needs none)."""
    meta: dict[str, Any] = {}


class Source(Protocol):
    """Numbered items of one data set; ``item(i)`` is the same in every process."""

    name: str
    own_reward: str
    """What task.reward=task means here: reasoning_gym | exact | math."""

    def __len__(self) -> int: ...

    def item(self, position: int) -> Item: ...


def digest(text: str) -> int:
    """64 bits of a text, the same in every process (``hash`` is not)."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def same_side(text: str) -> str:
    """What near copies of a question share: its words, letter case aside."""
    return " ".join(text.casefold().split())


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a question belongs to the held-out split.

    It depends on nothing but the question, so that a warm start and the run after it, whatever their seeds and sizes,
    hold out the same questions. Letter case and white space do not count: near copies fall on one side.
    """
    return digest("held-out " + same_side(text)) < int(fraction * 2**64)
