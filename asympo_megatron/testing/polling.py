"""Waiting for what another process does and does not tell: a row in its file, its end, a port that opens.

Inside one process there is always something to wait on (an event, a bell, :meth:`FakeEngine.until`); nothing but this
sleeps in a test.
"""

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float, period_s: float = 0.01) -> None:
    """Ask again and again until ``condition()`` holds; it may raise where waiting has no sense any more.

    Args:
        condition: a fact outside of this process.
        what: names it in the error.
        timeout_s: catches a hang; no busy machine should reach it.
        period_s: between two questions.

    Raises:
        AssertionError: it never held.
    """
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise AssertionError(f"{what}: not within {timeout_s:g} s.")
        time.sleep(period_s)
