"""A task: training prompts by index, held-out prompts, and the codec that made their ids."""

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from asympo_megatron.config import Config
from asympo_megatron.config.rollout_schema import TaskConfig
from asympo_megatron.errors import ConfigError, TaskError
from asympo_megatron.tasks.codec import Codec
from asympo_megatron.tasks.items import Item, Prompt, Source, is_held_out, same_side
from asympo_megatron.tasks.jsonl import JsonlSource
from asympo_megatron.tasks.sources import open_source
from asympo_megatron.tasks.stream import Order, PromptStream

_log = logging.getLogger(__name__)

ALPHABET_ITEMS = 1000
"""Training items whose reference answers make the alphabet of label noise."""


@dataclass(frozen=True)
class Task:
    """Prompts of a run. ``train_prompt(i)`` and ``eval_prompts(n)`` are the same in every process."""

    codec: Codec
    source: Source
    train_stream: PromptStream
    eval_stream: PromptStream
    order: Order

    @property
    def epoch_size(self) -> int:
        """Training prompts of one epoch. Walks the whole data set when first asked for."""
        return self.order.epoch_size

    def train_prompt(self, index: int) -> Prompt:
        """The training prompt at a position of the endless order; epochs after the first are reshuffled."""
        return self._prompt(index, self.order.at(index))

    def eval_prompts(self, limit: int) -> list[Prompt]:
        """The first ``limit`` held-out prompts, or all if there are fewer.

        Raises:
            TaskError: nothing is held out.
        """
        found = self.eval_stream.fill_held_out(limit)
        if found == 0 and limit > 0:
            raise TaskError(
                f"no held-out prompt ({self.eval_stream.describe()}). "
                "Raise task.eval_fraction, set task.eval_path, or set rollout.eval.interval_steps=0."
            )
        return [self._prompt(row, item) for row, item in enumerate(self.eval_stream.held_out[:limit])]

    def train_example(self, index: int) -> tuple[Prompt, list[int]]:
        """A training prompt with the ids of its reference answer and the end token."""
        item = self.order.at(index)
        if item.label_text is None:
            raise TaskError(f"{self.source.name} has no reference answers; rollout.source=supervised cannot use it.")
        return self._prompt(index, item), self.codec.encode_label(item.label_text)

    @cached_property
    def answer_alphabet(self) -> tuple[int, ...]:
        """Sorted token ids of the reference answers of the first training items, without special tokens."""
        count = min(self.train_stream.fill_train(ALPHABET_ITEMS), ALPHABET_ITEMS)
        texts = [text for item in self.train_stream.train[:count] if (text := item.label_text) is not None]
        return tuple(sorted({token for text in texts for token in self.codec.encode_label(text)[:-1]}))

    def _prompt(self, index: int, item: Item) -> Prompt:
        return Prompt(
            index=index,
            ids=self.codec.encode_prompt(item),
            question=item.text,
            answer=item.answer or "",
            meta=item.meta,
        )


def load_task(config: Config, model_dir: str | Path) -> Task:
    """Open the task of a configuration with the tokenizer of ``model_dir``.

    Prompts longer than rollout.sampling.max_prompt_tokens (and, for supervised steps, items without a reference answer
    or with one longer than max_new_tokens) are dropped, counted and logged.

    Raises:
        TaskError: no data, no tokenizer, or no prompt left.
    """
    _check_split(config.task)
    codec = Codec.load(config, Path(model_dir))
    source = open_source(config.task)
    refusal = _Refusal(config, codec)
    if config.task.eval_path:
        held = PromptStream(JsonlSource(config.task, config.task.eval_path), lambda _: True, refusal.without_labels)
        held.fill_held_out(len(held.source) + 1)
        known = {same_side(item.text) for item in held.held_out}
        train = PromptStream(source, lambda text: same_side(text) in known, refusal)
    else:
        fraction = config.task.eval_fraction
        train = held = PromptStream(source, lambda text: is_held_out(text, fraction), refusal)
    if train.fill_train(1) == 0:
        raise TaskError(
            f"the task is empty: {train.describe()}. Raise the limits of rollout.sampling (max_prompt_tokens="
            f"{refusal.max_prompt}, max_new_tokens={refusal.max_new}), lower task.eval_fraction, or check the data."
        )
    return Task(codec, source, train, held, Order(train, config.task.seed, config.task.shuffle))


def _check_split(task: TaskConfig) -> None:
    if not 0 <= task.eval_fraction < 1:
        raise ConfigError(f"task.eval_fraction is {task.eval_fraction}; it is a share of the prompts, 0 <= share < 1.")
    if task.eval_path and task.kind != "jsonl":
        raise ConfigError(f"task.eval_path works with task.kind=jsonl; {task.kind} holds out task.eval_fraction.")


class _Refusal:
    """Reason why an item cannot be used, or None."""

    def __init__(self, config: Config, codec: Codec) -> None:
        self._codec = codec
        self._supervised = config.rollout.source == "supervised"
        self.max_prompt = config.rollout.sampling.max_prompt_tokens
        self.max_new = config.rollout.sampling.max_new_tokens

    def __call__(self, item: Item) -> str | None:
        return self.without_labels(item) or (self._label_reason(item) if self._supervised else None)

    def without_labels(self, item: Item) -> str | None:
        ids = self._codec.encode_prompt(item)
        if not ids:
            return "with an empty prompt"
        if self._codec.has_unknown(ids):
            return "with characters outside the vocabulary"
        if len(ids) > self.max_prompt:
            return f"with more than {self.max_prompt} prompt tokens"
        return None

    def _label_reason(self, item: Item) -> str | None:
        if item.label_text is None:
            return "without a reference answer"
        label = self._codec.encode_label(item.label_text)
        if self._codec.has_unknown(label):
            return "with an answer outside the vocabulary"
        if len(label) > self.max_new:
            return f"with more than {self.max_new} answer tokens"
        return None
