"""Child processes that never outlive their parent: start, watch, stop."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from asympo_megatron.errors import AsympoError

_PR_SET_PDEATHSIG = 1
_TAIL_LINES = 60
_TAIL_BYTES = 64 * 1024


class ChildDiedError(AsympoError, RuntimeError):
    """A supervised role ended although the run was not over."""


@dataclass
class Child:
    """A started role, the log that holds its output from a byte on, and the signal that ends it."""

    role: str
    process: subprocess.Popen[bytes]
    log: Path
    log_start: int
    stop_signal: signal.Signals


def die_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """Ask the kernel for this signal when the parent process dies, however it dies (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number)


class Children:
    """The roles of one run. Each is the leader of its own process group, so that its helpers stop with it."""

    def __init__(self, logs: Path, grace_s: float = 10.0) -> None:
        self._logs = logs
        self._grace_s = grace_s
        self._logs.mkdir(parents=True, exist_ok=True)
        self._children: list[Child] = []

    def start(
        self,
        role: str,
        command: Sequence[str],
        env: dict[str, str] | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
    ) -> Child:
        """Start a role; its output goes to logs/ROLE.log, after what is already there.

        The log is for its owner alone: SGLang prints its arguments, the key included.

        Args:
            stop_signal: ends it, from :meth:`stop` or when this process dies.
        """
        log = self._logs / f"{role}.log"
        log.touch(mode=0o600)
        with log.open("ab") as out:
            log_start = out.tell()
            process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                start_new_session=True,
                preexec_fn=partial(die_with_parent, stop_signal),
            )
        child = Child(role, process, log, log_start, stop_signal)
        self._children.append(child)
        return child

    def check(self) -> None:
        """Raise if any role has ended.

        Raises:
            ChildDiedError: with the role, its exit code and the last lines of its log.
        """
        for child in self._children:
            code = child.process.poll()
            if code is not None:
                raise ChildDiedError(death_notice(child, code))

    def forget(self, child: Child) -> None:
        """A role that has ended as it should."""
        self._children.remove(child)

    def stop(self) -> None:
        """Its signal to each, SIGKILL to those that have not ended after a grace period; returns when all are gone."""
        for child in self._children:
            _signal_group(child, child.stop_signal)
        deadline = time.monotonic() + self._grace_s
        for child in self._children:
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _signal_group(child, signal.SIGKILL)
                child.process.wait()
            _signal_group(child, signal.SIGKILL)  # what it may have left in its group
        self._children.clear()


def death_notice(child: Child, code: int) -> str:
    """One message that says who died, how, and its last words."""
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
    return f"{child.role} {how}. The end of {child.log}:\n{last_words(child)}"


def last_words(child: Child, lines: int = 12) -> str:
    """The reason that the role itself gave at the end of its log; without one, the last non-empty lines.

    What an earlier process wrote is not read, nor more than the end of a log that grew for weeks.
    """
    text = b""
    with contextlib.suppress(FileNotFoundError), child.log.open("rb") as log:
        log.seek(max(child.log_start, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
        text = log.read()
    tail = [line for line in text.decode(errors="replace").splitlines() if line.strip()][-_TAIL_LINES:]
    # torchrun writes pages of its own below the error of a rank
    reasons = list(dict.fromkeys(line for line in tail if line.startswith("asympo: ")))
    return "\n".join(f"    {line}" for line in reasons or tail[-lines:]) or "    (empty)"


def _signal_group(child: Child, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # the whole group is gone
        os.killpg(child.process.pid, number)
