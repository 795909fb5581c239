"""One timer for many requests that all have the same time-out."""

import asyncio
from collections.abc import Callable


class Expiry:
    """Calls back what is not removed within ``timeout_s``.

    Every entry has the same time-out, so the oldest one is due first: one timer serves all, and an entry that is
    removed in time costs two operations on a dictionary.

    Args:
        timeout_s: from :meth:`add` to the call.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._entries: dict[int, tuple[float, Callable[[], None]]] = {}
        self._next_ticket = 0
        self._timer: asyncio.TimerHandle | None = None

    def add(self, call: Callable[[], None]) -> int:
        """Call ``call`` once when the time is over; returns a ticket for :meth:`remove`."""
        loop = asyncio.get_running_loop()
        ticket, due_s = self._next_ticket, loop.time() + self._timeout_s
        self._next_ticket += 1
        self._entries[ticket] = (due_s, call)
        if self._timer is None:
            self._timer = loop.call_at(due_s, self._fire)
        return ticket

    def remove(self, ticket: int) -> None:
        """It is done, in time or not."""
        self._entries.pop(ticket, None)

    def close(self) -> None:
        """Forget everything."""
        self._entries.clear()
        if self._timer is not None:
            self._timer.cancel()

    def _fire(self) -> None:
        """Call what is due, and set the timer for the oldest of the rest (none: the next ``add`` sets it)."""
        loop = asyncio.get_running_loop()
        assert self._timer is not None
        now_s = self._timer.when()  # the loop may call a timer up to a tick of its clock early
        self._timer = None
        while self._entries:
            ticket = next(iter(self._entries))
            due_s, call = self._entries[ticket]
            if due_s > now_s:
                self._timer = loop.call_at(due_s, self._fire)
                return
            del self._entries[ticket]
            call()
