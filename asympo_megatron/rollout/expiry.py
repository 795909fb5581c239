"""One timer for many requests that all have the same time-out."""

import asyncio
from abc import ABC, abstractmethod
from itertools import islice
from typing import Generic, TypeVar


class Expiring(ABC):
    """What expires."""

    __slots__ = ("due_s",)
    due_s: float

    @abstractmethod
    def expire(self) -> None:
        """Its time is over."""


Entry = TypeVar("Entry", bound=Expiring)


class Expiry(Generic[Entry]):
    """Calls what is not removed within ``timeout_s``.

    Every entry has the same time-out, so the oldest one is due first: one timer serves all, and an entry that is
    removed in time costs two operations on a dictionary.

    Args:
        timeout_s: from :meth:`add` to the call.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._entries: dict[Entry, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def add(self, entry: Entry) -> None:
        """Call ``entry.expire()`` once when the time is over."""
        loop = asyncio.get_running_loop()
        entry.due_s = loop.time() + self._timeout_s
        self._entries[entry] = None
        if self._timer is None:
            self._timer = loop.call_at(entry.due_s, self._fire)

    def remove(self, entry: Entry) -> None:
        """It is done, in time or not."""
        self._entries.pop(entry, None)

    def expire_oldest(self, count: int, added_until_s: float) -> bool:
        """Call at most ``count`` now, the oldest, of those added until this time of the loop; False when none is left.

        Repeated until then, it calls all that was there at that time, and nothing that came later.
        """
        due = [entry for entry in islice(self._entries, count) if entry.due_s <= added_until_s + self._timeout_s]
        for entry in due:
            del self._entries[entry]
            entry.expire()
        return bool(due)

    def close(self) -> list[Entry]:
        """Call nothing any more; returns what was waiting."""
        entries, self._entries = list(self._entries), {}
        if self._timer is not None:
            self._timer.cancel()
        return entries

    def _fire(self) -> None:
        """Call what is due, and set the timer for the oldest of the rest (none: the next ``add`` sets it)."""
        loop = asyncio.get_running_loop()
        assert self._timer is not None
        now_s = self._timer.when()  # the loop may call a timer up to a tick of its clock early
        self._timer = None
        while self._entries:
            entry = next(iter(self._entries))
            if entry.due_s > now_s:
                self._timer = loop.call_at(entry.due_s, self._fire)
                return
            del self._entries[entry]
            entry.expire()
