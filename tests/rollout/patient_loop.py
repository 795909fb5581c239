"""An event loop for deadlines in tests: its clock counts what the loop waits, not what the machine makes it wait."""

import asyncio
import selectors
import time
from collections.abc import Callable
from typing import Any

SLICE_S = 0.005
"""One wait counts at most this much, however late the process was woken."""
TURN_S = 20e-6
"""One turn of the loop counts at least this much, so that a loop that never rests reaches its limit, too."""


class PatientLoop(asyncio.SelectorEventLoop):
    """Time stands still while callbacks run, and while the process is not run at all.

    A deadline of a second is then a second in which nothing came, on a machine that is busy with something else, too;
    what both ends of a connection need for their answers, in this same loop, does not count.
    """

    def __init__(self) -> None:
        self._now_s = 0.0
        super().__init__(_Slicing(self._pass))

    def time(self) -> float:
        return self._now_s

    def _pass(self, seconds: float) -> None:
        self._now_s += min(max(seconds, TURN_S), SLICE_S)


class _Slicing(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    """Waits in slices, so that whatever came in meanwhile is seen before time goes on."""

    def __init__(self, passed: Callable[[float], None]) -> None:
        super().__init__()
        self._passed = passed

    def select(self, timeout: float | None = None) -> Any:
        started_s = time.monotonic()
        ready = super().select(SLICE_S if timeout is None else min(timeout, SLICE_S))
        self._passed(time.monotonic() - started_s)
        return ready
