"""An event loop on a virtual clock: when nothing is left to run, time jumps to the next timer.

Hours of waiting pass in no time, and the same program takes the same course every time. For code without sockets: what
comes from outside has no place on this clock.
"""

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any


class VirtualLoop(asyncio.SelectorEventLoop):
    """``time()`` starts at 0 and moves only from timer to timer. Work for a thread runs at once, in no time.

    Raises:
        RuntimeError: every task waits and no timer is set; a real loop would hang for ever.
    """

    def __init__(self) -> None:
        self._now_s = 0.0
        super().__init__(_Jumping(self._jump))

    def time(self) -> float:
        return self._now_s

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """A real thread would let time jump to the next deadline while it works."""
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def _jump(self, seconds: float) -> None:
        self._now_s += seconds


class _Jumping(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    """Where a loop would sleep, its clock jumps."""

    def __init__(self, jump: Callable[[float], None]) -> None:
        super().__init__()
        self._jump = jump

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if ready:
            return ready
        if timeout is None:
            raise RuntimeError("every task waits and no timer is set: nothing will ever happen again.")
        self._jump(max(0.0, timeout))
        return ready


def run_virtual(work: Coroutine[Any, Any, Any]) -> Any:
    """``asyncio.run`` on a virtual clock."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work)
