"""The distinct prompts of a source, in order, each on exactly one side of the split."""

import logging
from collections import Counter
from collections.abc import Callable
from random import Random

from asympo_megatron.errors import TaskError
from asympo_megatron.tasks.items import Item, Source, digest

_log = logging.getLogger(__name__)


class PromptStream:
    """Walks a source lazily and sorts its items into ``train`` and ``held_out``.

    A question met before is skipped; an item that ``refuse`` names a reason for is dropped and counted. The walk is a
    function of the source alone, so the n-th training item is the same in every process and after every restart.

    Args:
        source: numbered items.
        held_out: question -> whether it is held out.
        refuse: item -> reason why it cannot be used, or None.
    """

    def __init__(self, source: Source, held_out: Callable[[str], bool], refuse: Callable[[Item], str | None]) -> None:
        self.source = source
        self.train: list[Item] = []
        self.held_out: list[Item] = []
        self.dropped: Counter[str] = Counter()
        self._is_held_out = held_out
        self._refuse = refuse
        self._seen: set[int] = set()
        self._next = 0

    @property
    def exhausted(self) -> bool:
        return self._next >= len(self.source)

    def fill_train(self, count: int) -> int:
        """Walk until ``count`` training items are known or the source ends; return how many are known."""
        while len(self.train) < count and not self.exhausted:
            self._advance()
        return len(self.train)

    def fill_held_out(self, count: int) -> int:
        """Walk until ``count`` held-out items are known or the source ends; return how many are known."""
        while len(self.held_out) < count and not self.exhausted:
            self._advance()
        return len(self.held_out)

    def describe(self) -> str:
        """Counts for messages."""
        dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(self.dropped.items())) or "none"
        return (
            f"{self.source.name}: {self._next} of {len(self.source)} items read, {len(self.train)} for training, "
            f"{len(self.held_out)} held out, dropped: {dropped}"
        )

    def _advance(self) -> None:
        item = self.source.item(self._next)
        self._next += 1
        text = item.text
        key = digest(text)
        if key not in self._seen:
            self._seen.add(key)
            reason = self._refuse(item)
            if reason is not None:
                self.dropped[reason] += 1
            elif self._is_held_out(text):
                self.held_out.append(item)
            else:
                self.train.append(item)
        if self.exhausted:
            level = logging.WARNING if self.dropped else logging.INFO
            _log.log(level, "%s", self.describe())


class Order:
    """Which training item comes at a given index, for ever.

    Epoch 0 is the order of the stream; every later epoch is its own permutation by (seed, epoch).
    """

    def __init__(self, stream: PromptStream, seed: int, shuffle: bool) -> None:
        self._stream = stream
        self._seed = seed
        self._shuffle = shuffle
        self._permutation: tuple[int, list[int]] = (0, [])

    @property
    def epoch_size(self) -> int:
        """Training items of one epoch. Walks the source to its end when first asked for."""
        return self._stream.fill_train(len(self._stream.source) + 1)

    def at(self, index: int) -> Item:
        if index < 0:
            raise TaskError(f"prompt index {index} is negative; training prompts are numbered from 0.")
        if index < self._stream.fill_train(index + 1):
            return self._stream.train[index]
        epoch, position = divmod(index, self.epoch_size)
        if not self._shuffle:
            return self._stream.train[position]
        if self._permutation[0] != epoch:
            rows = list(range(self.epoch_size))
            Random(f"{self._seed}/{epoch}").shuffle(rows)
            self._permutation = (epoch, rows)
        return self._stream.train[self._permutation[1][position]]
