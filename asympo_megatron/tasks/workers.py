"""A pool of reward workers: processes that may hang, crash or eat memory without harm to the controller."""

import asyncio
import json
import os
import secrets
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from asympo_megatron.errors import RewardError

MEMORY_BYTES = 1 << 30
"""What one answer may allocate in a fenced worker, beyond its imports."""

START_TIMEOUT_S = 120.0
"""Imports of a worker on a busy machine; a user's reward module may load a model."""

_LINE_BYTES = 1 << 26
_KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONHASHSEED", "TZ")
"""What a fenced worker sees of the environment: tokens and keys stay outside."""


class WorkerLostError(Exception):
    """The worker hung, died or ran out of memory over a job, and was ended."""


class WorkerRaisedError(Exception):
    """The scorer raised an exception over a job."""


class ScorerFaultError(RewardError):
    """The scorer cannot judge this prompt, whatever the answer; the worker is well."""


@dataclass(frozen=True)
class WorkerSpec:
    """What the workers of a pool do.

    Args:
        kind: reasoning_gym | math | function (:func:`asympo_megatron.tasks.judges.build`).
        setup: what that judge is built from.
        fenced: memory limit, bare environment and no processes, sockets or writing (code that parses model output);
            false for a user's own function, which may need all of them.
    """

    kind: str
    setup: dict[str, Any] = field(default_factory=dict)
    fenced: bool = True


@dataclass(frozen=True)
class Verdict:
    """What a job returned, and the audit events that the fence refused over it."""

    value: Any
    refused: list[str]


class WorkerPool:
    """Runs jobs one at a time in each of ``size`` processes, started when first needed and replaced when lost."""

    def __init__(self, spec: WorkerSpec, size: int, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._workers = [_Worker(spec) for _ in range(size)]
        self._idle: asyncio.LifoQueue[_Worker] = asyncio.LifoQueue()
        for worker in self._workers:
            self._idle.put_nowait(worker)

    async def call(self, job: dict[str, Any]) -> Verdict:
        """Run one job.

        Raises:
            WorkerLostError: over time, dead, or out of memory; the worker is replaced.
            WorkerRaisedError: the scorer raised.
            RewardError: the worker cannot start.
            ScorerFaultError: the scorer fails for a reason that is not the answer's.
        """
        worker = await self._idle.get()
        try:
            return await worker.run(job, self._timeout_s)
        except BaseException as error:
            if not isinstance(error, WorkerRaisedError | ScorerFaultError):
                await worker.end()  # also when cancelled: a late reply must not meet the next job
            raise
        finally:
            self._idle.put_nowait(worker)

    @property
    def process_ids(self) -> list[int]:
        """Processes that run now."""
        return [worker.process.pid for worker in self._workers if worker.process is not None]

    async def close(self) -> None:
        """End every worker."""
        for worker in self._workers:
            await worker.end()


class _Worker:
    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self.process: asyncio.subprocess.Process | None = None

    async def run(self, job: dict[str, Any], timeout_s: float) -> Verdict:
        if self.process is None or self.process.returncode is not None:
            await self.end()
            await self._start()
        token = secrets.token_hex(8)
        try:
            reply = await asyncio.wait_for(self._exchange({"token": token, "job": job}), timeout_s)
        except TimeoutError:
            raise WorkerLostError(f"no reply within {timeout_s:g} s") from None
        if reply.get("token") != token:  # written by an answer's code, not by the program of the worker
            raise WorkerLostError("a forged reply")
        if "memory" in reply:
            raise WorkerLostError(f"more than {MEMORY_BYTES >> 20} MiB of memory")
        if "fault" in reply:
            raise ScorerFaultError(f"the {self._spec.kind} scorer failed: {reply['fault']}")
        if "raised" in reply:
            raise WorkerRaisedError(reply["raised"])
        return Verdict(reply["value"], reply["refused"])

    async def end(self) -> None:
        """Kill the process with everything it started, and wait for it."""
        process, self.process = self.process, None
        if process is None:
            return
        started = [] if self._spec.fenced else _descendants(process.pid)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for child in started:
            with suppress(psutil.Error):
                child.kill()
        await process.wait()
        if process.stdin is not None:
            process.stdin.close()

    async def _start(self) -> None:
        spec = self._spec
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # the folder of the program holds reasoning_gym.py, which must not hide the package
            str(Path(__file__).with_name("worker_main.py")),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_LINE_BYTES,
            start_new_session=True,
            env=_bare_environment() if spec.fenced else None,
            cwd="/" if spec.fenced else None,
        )
        setup = {
            "parent": os.getpid(),
            "path": [os.path.abspath(entry) for entry in sys.path],
            "kind": spec.kind,
            "setup": spec.setup,
            "fenced": spec.fenced,
            "memory_bytes": MEMORY_BYTES,
        }
        try:
            reply = await asyncio.wait_for(self._exchange(setup), START_TIMEOUT_S)
        except (TimeoutError, WorkerLostError) as error:
            raise RewardError(f"a {spec.kind} reward worker did not start: {error or 'no reply'}.") from error
        if "fault" in reply:
            raise RewardError(f"a {spec.kind} reward worker did not start: {reply['fault']}.")

    async def _exchange(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self.process is not None
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            await self.process.stdin.drain()
            line = await self.process.stdout.readline()
            reply = json.loads(line)
        except (OSError, ValueError) as error:  # broken pipe, end of file, or bytes that are no JSON
            raise WorkerLostError("the worker died") from error
        if not isinstance(reply, dict):
            raise WorkerLostError("a forged reply")
        return reply


def _descendants(pid: int) -> list[psutil.Process]:
    """What a worker started in sessions of their own, as code runners do. Stopped first, it starts no more."""
    try:
        worker = psutil.Process(pid)
        worker.suspend()
        return worker.children(recursive=True)
    except psutil.Error:
        return []


def _bare_environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    return {**kept, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
