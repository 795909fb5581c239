"""The one thread that owns the model; the event loop talks to it through an inbox."""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from asympo_megatron.engine.scheduler import Scheduler, WeightUpdate
from asympo_megatron.engine.sequence import Sequence
from asympo_megatron.errors import EngineError

logger = logging.getLogger(__name__)

_JOIN_TIMEOUT_S = 30.0


class ModelThread:
    """Runs a scheduler: jobs between steps, steps while there is work, finished sequences back to the loop."""

    def __init__(self, scheduler: Scheduler, threads: int | None) -> None:
        self._scheduler = scheduler
        self._threads = threads
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine-model", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        """Start on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End after the current step. Sequences still there fail with an EngineError."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(_JOIN_TIMEOUT_S)

    def submit(self, sequences: list[Sequence]) -> None:
        """Queue sequences; each completes its own future."""
        self._post(lambda: self._scheduler.add(sequences))

    def abandon(self, rids: set[str]) -> None:
        """Stop sampling for requests that nobody waits for."""
        with suppress(EngineError):
            self._post(lambda: self._scheduler.abort_exactly(rids))

    async def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run a function of the scheduler between two steps and return its result."""
        future = asyncio.get_running_loop().create_future()

        def job() -> None:
            try:
                result, error = function(*args), None
            except Exception as raised:  # handed to the caller
                result, error = None, raised
            self._resolve(future, result, error)

        self._post(job)
        return await future

    async def update(self, weights: Any, path: str, version: str | None, flush_cache: bool) -> None:
        """Change weights as soon as the scheduler's rules allow.

        Raises:
            EngineError: refused; the weights are unchanged.
        """
        future = asyncio.get_running_loop().create_future()
        update = WeightUpdate(
            weights, path, version, flush_cache, done=lambda error: self._resolve(future, None, error)
        )
        self._post(lambda: self._scheduler.update(update))
        await future

    def _post(self, job: Callable[[], None]) -> None:
        if not self.alive or self._stopping:
            raise EngineError("the engine is shutting down.")
        with self._wake:
            self._inbox.append(job)
            self._wake.notify()

    def _run(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        with torch.inference_mode():
            while True:
                with self._wake:
                    while not (self._inbox or self._stopping or self._scheduler.has_work):
                        self._wake.wait()
                    jobs = list(self._inbox)
                    self._inbox.clear()
                for job in jobs:
                    job()
                if self._stopping:
                    self._fail(EngineError("the engine is shutting down."))
                    return
                self._step()

    def _step(self) -> None:
        try:
            if self._scheduler.has_work:
                self._scheduler.step()
        except Exception as error:
            logger.exception("a decode step failed; its requests are answered with 500")
            self._fail(error)
        finished, self._scheduler.finished = self._scheduler.finished, []
        if finished:
            self._on_loop(_complete, finished)

    def _fail(self, error: Exception) -> None:
        lost = self._scheduler.fail_all()
        if lost:
            self._on_loop(_complete_with_error, lost, error)

    def _resolve(self, future: asyncio.Future, result: Any, error: Exception | None) -> None:
        self._on_loop(_set_future, future, result, error)

    def _on_loop(self, function: Callable[..., None], *args: Any) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)


def _complete(finished: list[Sequence]) -> None:
    for sequence in finished:
        _set_future(sequence.future, sequence, None)


def _complete_with_error(lost: list[Sequence], error: Exception) -> None:
    for sequence in lost:
        _set_future(sequence.future, None, error)


def _set_future(future: asyncio.Future, result: Any, error: Exception | None) -> None:
    if future.done():  # its request was cancelled
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
