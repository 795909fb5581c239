"""Small asyncio helpers: a condition that anybody may ring, and background tasks whose failure is never silent."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

log = logging.getLogger(__name__)


class Bell:
    """Wakes everybody who waits for "something changed"."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._listeners: list[Callable[[], None]] = []

    def ring(self) -> None:
        """Wake every waiter once."""
        event, self._event = self._event, asyncio.Event()
        event.set()
        for listener in self._listeners:
            listener()

    def listen(self, listener: Callable[[], None]) -> None:
        """Call it at every ring: for who keeps thousands of waiters and knows which of them are concerned."""
        self._listeners.append(listener)

    async def until(self, condition: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Wait until ``condition()`` holds, asking again after every ring; False when the time is over."""
        if condition():
            return True
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    event = self._event
                    if condition():
                        return True
                    await event.wait()
        except TimeoutError:
            return condition()


class Background:
    """Tasks that run beside the calls. The first one that fails ends the controller: see :attr:`failure`."""

    def __init__(self, bell: Bell) -> None:
        self.failure: BaseException | None = None
        self._bell = bell
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Start a task."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def fail(self, error: BaseException) -> None:
        """Record the failure that ends the controller; later ones only follow from it."""
        if self.failure is None:
            self.failure = error
            self._bell.ring()

    async def stop(self) -> None:
        """Cancel every task and wait for its end."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            log.error("%s failed", task.get_name(), exc_info=error)
            self.fail(error)
