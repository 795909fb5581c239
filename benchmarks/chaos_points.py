"""Named points inside a process under test, and the faults that happen there.

The conductor arms a fault by writing ``ROLE.fault`` (one JSON object); the process looks for that file whenever it
comes to one of its points, and does the fault to itself, so a fault named "in the middle of a lease" is there and
nowhere else. What happened goes to ``events.jsonl``, one line a write.
"""

import functools
import inspect
import json
import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

EVENTS = "events.jsonl"
DAY_S, HOUR_S = 86_400.0, 3_600.0


@dataclass(frozen=True)
class Armed:
    """A fault that waits for its point; ``skip`` visits of the point go by first."""

    number: int
    point: str
    kind: str
    skip: int = 0


def arm(home: Path, role: str, fault: Armed) -> None:
    """Put a fault in the way of a role."""
    temporary = home / f".{role}.fault"
    temporary.write_text(json.dumps(asdict(fault)))
    temporary.replace(home / f"{role}.fault")


def disarm(home: Path, role: str) -> None:
    """Take back a fault that has not happened."""
    (home / f"{role}.fault").unlink(missing_ok=True)


class Clock:
    """The clocks of a process, which a fault may move: the wall clock both ways, the monotonic one only forward."""

    def __init__(self) -> None:
        self._wall_s = self._monotonic_s = 0.0

    def install(self) -> None:
        """For this process, for good: asyncio, aiohttp and tenacity ask the module ``time`` whenever they want it."""
        wall, monotonic = time.time, time.monotonic
        time.time = lambda: wall() + self._wall_s
        time.monotonic = lambda: monotonic() + self._monotonic_s

    def jump(self, kind: str) -> None:
        if kind == "suspend":  # a machine that slept: every deadline is over at once
            self._wall_s += HOUR_S
            self._monotonic_s += HOUR_S
        else:
            self._wall_s += DAY_S if kind == "clock_forward" else -DAY_S


class Points:
    """The points of one process.

    Args:
        home: directory of armed faults and events.
        role: e.g. ``controller``, ``trainer``, ``engine0``.
    """

    def __init__(self, home: Path, role: str) -> None:
        self.role, self._home = role, home
        self._file = home / f"{role}.fault"
        self._events = os.open(home / EVENTS, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)
        self._visits: dict[int, int] = {}
        self._clock = Clock()
        self._clock.install()

    def note(self, event: str, **facts: Any) -> None:
        """Write an event, also while no other file may grow."""
        line = json.dumps({"event": event, "role": self.role, "pid": os.getpid(), **facts})
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        os.write(self._events, line.encode() + b"\n")
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def reach(self, point: str) -> str | None:
        """The process is at a point; returns the kind of a fault that the caller must do itself."""
        if not self._file.exists():
            return None
        try:
            armed = Armed(**json.loads(self._file.read_text()))
        except OSError:  # taken back meanwhile
            return None
        if armed.point != point:
            return None
        visits = self._visits[armed.number] = self._visits.get(armed.number, -1) + 1
        if visits < armed.skip:
            return None
        self._file.unlink(missing_ok=True)
        self.note("fault", number=armed.number, point=point, kind=armed.kind)
        self._happen(armed.kind)
        return armed.kind

    def _happen(self, kind: str) -> None:
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind in ("stop", "replace"):
            os.kill(os.getpid(), signal.SIGSTOP)
        elif kind == "disk_full":  # no regular file may grow; the conductor lifts it
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        elif kind in ("clock_forward", "clock_back", "suspend"):
            self._clock.jump(kind)

    def pierce(self, owner: Any, name: str, point: str) -> None:
        """Put ``point:before`` and ``point:after`` around a method or function."""
        setattr(owner, name, self._around(getattr(owner, name), point))

    def _around(self, inner: Callable[..., Any], point: str) -> Callable[..., Any]:
        before, after = f"{point}:before", f"{point}:after"
        if inspect.iscoroutinefunction(inner):

            @functools.wraps(inner)
            async def asynchronous(*args: Any, **kwargs: Any) -> Any:
                self.reach(before)
                result = await inner(*args, **kwargs)
                self.reach(after)
                return result

            return asynchronous

        @functools.wraps(inner)
        def plain(*args: Any, **kwargs: Any) -> Any:
            self.reach(before)
            result = inner(*args, **kwargs)
            self.reach(after)
            return result

        return plain


class Events:
    """What the processes wrote, in the order of the file."""

    def __init__(self, home: Path) -> None:
        self._path, self._offset = home / EVENTS, 0
        self.all: list[dict[str, Any]] = []

    def poll(self) -> list[dict[str, Any]]:
        """Events since the last call."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            complete, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(complete) + len(newline)
        found = [json.loads(line) for line in complete.splitlines()]
        self.all += found
        return found
