"""A scripted engine on the loop's clock: continuous batching, one token a request and iteration, given lengths.

An iteration takes ``iteration_s + request_s x running requests``: a nearly empty engine is faster for each request
that is left, and far slower in sum. Prompts cost nothing. A weight update in place pauses the engine; running requests
go on after it, and the tokens that follow carry the new version.
"""

import asyncio
import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, field

from asympo_megatron.records import VersionSpan
from asympo_megatron.rollout.answer import Answer, AnswerReader, GenerateRequest

_TOKEN = 2


@dataclass(frozen=True)
class EngineModel:
    """How fast an engine decodes.

    Args:
        slots: requests that decode at the same time.
        iteration_s: of an iteration, however many requests it serves (weights are read once).
        request_s: more for each of them (their keys and values).
        update_s: pause of a weight update.
    """

    slots: int
    iteration_s: float
    request_s: float
    update_s: float

    def seconds_per_iteration(self, running: int) -> float:
        return self.iteration_s + self.request_s * running

    @property
    def full_tokens_per_s(self) -> float:
        """With every slot taken."""
        return self.slots / self.seconds_per_iteration(self.slots)


@dataclass(order=True)
class _Running:
    end: float
    """In iterations of the engine."""
    order: int
    size: int = field(compare=False)
    done: asyncio.Future[None] = field(compare=False)
    versions: list[tuple[int, int]] = field(compare=False)
    """(version, first token)."""


class DecodingEngine:
    """What the controller asks of an engine's client, answered on the spot.

    Args:
        url: its name.
        model: its speed.
        length_of: tokens of the response to a request.
    """

    def __init__(self, url: str, model: EngineModel, length_of: Callable[[GenerateRequest], int]) -> None:
        self.url, self.model, self._length_of = url, model, length_of
        self.occupancy: list[tuple[float, int]] = [(0.0, 0)]
        """(seconds, running requests from then on)."""
        self.updates: list[tuple[float, float]] = []
        """Begin and end of each pause."""
        self._heap: list[_Running] = []
        self._iterations, self._counted_s, self._orders = 0.0, 0.0, 0
        self._label, self._paused = "default", False
        self._timer: asyncio.TimerHandle | None = None

    async def generate(self, request: GenerateRequest, reader: AnswerReader) -> Answer:
        if len(self._heap) >= self.model.slots:
            raise AssertionError(f"{self.url} has {self.model.slots} slots and was sent one more request")
        self._advance()
        most = request.sampling_params.max_new_tokens
        size = min(self._length_of(request), most)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._orders += 1
        running = _Running(self._iterations + size, self._orders, size, done, [(_version(self._label), 0)])
        heapq.heappush(self._heap, running)
        self._changed()
        await done
        finish = "length" if size == most else "stop"
        return Answer([_TOKEN] * size, _spans(running), finish, None, origin=self._label.partition(".")[2])

    async def update_weights(self, path: str, label: str, *, flush_cache: bool, timeout_s: float) -> None:
        started_s = asyncio.get_running_loop().time()
        await asyncio.sleep(self.model.update_s)
        self.updates.append((started_s, asyncio.get_running_loop().time()))
        self._label = label
        for running in self._heap:
            sampled = running.size - math.ceil(running.end - self._iterations - 1e-6)
            running.versions.append((_version(label), sampled))

    async def pause(self, mode: str) -> None:
        self._advance()
        self._paused = True
        self._changed()

    async def resume(self) -> None:
        self._advance()
        self._paused = False
        self._changed()

    async def ready(self) -> None:
        pass

    async def weight_label(self, attempts: int = 1, timeout_s: float | None = None) -> str:
        return self._label

    async def check_generates(self, timeout_s: float) -> None:
        pass

    async def abort(self, rid_prefix: str) -> None:
        if self._heap:
            raise AssertionError("nothing is ever aborted in these runs")

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _advance(self) -> None:
        """Count the iterations since the last change."""
        now_s = asyncio.get_running_loop().time()
        if self._heap and not self._paused:
            self._iterations += (now_s - self._counted_s) / self.model.seconds_per_iteration(len(self._heap))
        self._counted_s = now_s

    def _changed(self) -> None:
        loop = asyncio.get_running_loop()
        self.occupancy.append((loop.time(), len(self._heap)))
        if self._timer is not None:
            self._timer.cancel()
        if self._heap and not self._paused:
            left = self._heap[0].end - self._iterations
            delay_s = max(0.0, left) * self.model.seconds_per_iteration(len(self._heap))
            self._timer = loop.call_later(delay_s, self._finish)

    def _finish(self) -> None:
        self._advance()
        while self._heap and self._heap[0].end <= self._iterations + 1e-6:
            running = heapq.heappop(self._heap)
            if not running.done.done():
                running.done.set_result(None)
        self._changed()


def _version(label: str) -> int:
    return int(label.partition(".")[0])


def _spans(running: _Running) -> list[VersionSpan]:
    ends = [start for _, start in running.versions[1:]] + [running.size]
    marks = zip(running.versions, ends, strict=True)
    return [VersionSpan(version, start, end) for (version, start), end in marks if end > start]
