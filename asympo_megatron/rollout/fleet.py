"""The engines: their states, who may take a request, and which engine a request goes to.

starting -> syncing -> serving -> syncing -> ...       readiness, weights, requests
any -> quarantined -> starting                         a failure: its weights are no longer trusted
any -> evicted                                         failed too often, or never got ready; it may join again
"""

import asyncio
import heapq
import itertools
import logging
from dataclasses import dataclass
from enum import StrEnum

from asympo_megatron.rollout.bell import Bell
from asympo_megatron.rollout.client import EngineClient
from asympo_megatron.rollout.rows import VersionRow

log = logging.getLogger(__name__)


class EngineState(StrEnum):
    STARTING = "starting"
    SYNCING = "syncing"
    SERVING = "serving"
    QUARANTINED = "quarantined"
    EVICTED = "evicted"


@dataclass(eq=False)
class Engine:
    """One engine as the controller sees it."""

    url: str
    client: EngineClient
    state: EngineState = EngineState.STARTING
    weights: VersionRow | None = None
    """Installed and verified by this controller; None when unknown."""
    loading: VersionRow | None = None
    """Its files are verified or read; the publisher keeps them."""
    in_flight: int = 0
    failure: Exception | None = None
    """Why it must be quarantined."""
    quarantines: int = 0
    """In a row, without a good answer in between."""
    strikes: int = 0
    """Failed connections in a row."""
    quiet_since_s: float = 0.0
    """Time of the loop at its last good answer, or at the first request since it had none."""
    tag: str = ""
    """Ends the labels of its weights: behind a router an answer names who sampled it, and another controller that
    loads weights here is noticed. New in every life, so that an answer from before a failure is nobody's."""
    suspected: bool = False
    """A request failed in the router: this engine may be the reason, and is looked at."""
    last_error: str = ""

    @property
    def serving(self) -> bool:
        return self.state is EngineState.SERVING

    def label(self, row: VersionRow) -> str:
        """What it calls the weights of ``row``."""
        return f"{row.version}.{self.tag}" if self.tag else str(row.version)

    def answered(self) -> None:
        """A good answer came: earlier trouble is over."""
        self.quarantines = self.strikes = 0
        self.quiet_since_s = asyncio.get_running_loop().time()


_Waiter = tuple[int, int, int | None, asyncio.Future[Engine]]
"""Group, order of arrival (no two alike: nothing behind it is compared), version, the engine to come."""


class Fleet:
    """Hands out request slots of serving engines: oldest group first, least loaded engine, group by group.

    Args:
        max_in_flight: requests per engine; the rest waits here.
        affinity_slack: a group stays on its engine (whose prefix cache knows the prompt) while that engine has at most
            this many requests more than the least loaded one.
        bell: rung when an engine's state changes.
        routed: a router chooses the engine of a training request. Its slot then only counts: a slot is free while all
            requests are fewer than all serving engines may have.
    """

    def __init__(self, max_in_flight: int, affinity_slack: int, bell: Bell, *, routed: bool = False) -> None:
        self.engines: dict[str, Engine] = {}
        self._max_in_flight, self._affinity_slack, self._bell = max_in_flight, affinity_slack, bell
        self.routed = routed
        self._waiting: list[_Waiter] = []
        self._pinned: list[_Waiter] = []
        self._order = itertools.count()
        self._homes: dict[int, Engine] = {}

    @property
    def serving(self) -> list[Engine]:
        """Engines that take requests."""
        return [engine for engine in self.engines.values() if engine.serving]

    @property
    def in_flight(self) -> int:
        """Requests on engines."""
        return sum(engine.in_flight for engine in self.engines.values())

    @property
    def step(self) -> int | None:
        """Step of the weights that a request started now is sampled by, at least; None while no engine serves."""
        if self.routed:
            return self._routed_step()
        step = None
        for engine in self.engines.values():  # asked for every request, more than once
            weights = engine.weights
            if engine.state is EngineState.SERVING and weights is not None and (step is None or weights.step < step):
                step = weights.step
        return step

    def _routed_step(self) -> int | None:
        """A router also sends to an engine that will pause for other weights: what it holds, and then gets, counts."""
        rows = []
        for engine in self.engines.values():
            if engine.state in (EngineState.SERVING, EngineState.SYNCING) and engine.weights is not None:
                rows += [engine.weights, engine.loading or engine.weights]
        return min((row.step for row in rows), default=None)

    def set_state(self, engine: Engine, state: EngineState) -> None:
        """Change the state of an engine and wake whoever it concerns."""
        if engine.state is not state:
            log.debug("engine %s: %s -> %s", engine.url, engine.state, state)
            engine.state = state
            self._pump()
            self._bell.ring()

    def fail(self, engine: Engine, client: EngineClient, error: Exception) -> None:
        """Take an engine out of service at once; its lifecycle then quarantines it.

        ``client`` is the connection on which it failed: trouble on an earlier one is over.
        """
        if engine.client is not client or engine.failure is not None:
            return
        if engine.state in (EngineState.SERVING, EngineState.SYNCING):
            engine.failure, engine.last_error = error, str(error)
            self.set_state(engine, EngineState.QUARANTINED)

    def named(self, tag: str) -> Engine | None:
        """The engine that sampled an answer with this tag, unless it has failed since."""
        for engine in self.engines.values():
            if engine.tag == tag and engine.failure is None:
                return engine if engine.state in (EngineState.SERVING, EngineState.SYNCING) else None
        return None

    def suspect(self) -> None:
        """A request failed, and nobody knows on which engine: each looks at its own now."""
        engines = [engine for engine in self.serving if not engine.suspected]
        for engine in engines:
            engine.suspected = True
        if engines:
            self._bell.ring()

    async def acquire(self, group: int, version: int | None = None) -> Engine:
        """A request slot for a group, or (``version``) for an evaluation: only on engines with exactly that version.

        Whoever got it calls :meth:`release`.
        """
        queue = self._waiting if version is None else self._pinned
        if not queue:
            engine = self._grant(group, version)
            if engine is not None:
                return engine
        future: asyncio.Future[Engine] = asyncio.get_running_loop().create_future()
        heapq.heappush(queue, (group, next(self._order), version, future))
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.release(future.result())
            raise

    def release(self, engine: Engine) -> None:
        """The request is over: its slot goes to the next that waits."""
        engine.in_flight -= 1
        self._pump()

    def forget_group(self, group: int) -> None:
        """A group is complete: its affinity is no longer needed."""
        self._homes.pop(group, None)

    def _pump(self) -> None:
        for queue in (self._pinned, self._waiting):
            while queue:
                group, _, version, future = queue[0]
                if not future.done():  # else cancelled
                    engine = self._grant(group, version)
                    if engine is None:
                        break
                    future.set_result(engine)
                heapq.heappop(queue)

    def _grant(self, group: int, version: int | None) -> Engine | None:
        if self.routed and version is None and self.in_flight >= self._max_in_flight * len(self.serving):
            return None
        best, least = None, self._max_in_flight
        for engine in self.engines.values():
            if engine.in_flight < least and self._usable(engine, version):
                best, least = engine, engine.in_flight
        if best is None:
            return None
        home = self._homes.get(group)
        if home is not None and home is not best and home.in_flight <= least + self._affinity_slack:
            known = self.engines.get(home.url) is home  # not replaced by one that joined again under its url
            if known and self._usable(home, version):
                best = home
        self._homes[group] = best
        if best.in_flight == 0:
            best.quiet_since_s = asyncio.get_running_loop().time()
        best.in_flight += 1
        return best

    def _usable(self, engine: Engine, version: int | None) -> bool:
        if engine.state is not EngineState.SERVING or engine.in_flight >= self._max_in_flight:
            return False
        return version is None or (engine.weights is not None and engine.weights.version == version)
