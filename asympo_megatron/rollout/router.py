"""The user's router (sglang-router, smg) in front of the engines: for training requests alone.

    controller ── /generate ──► router ──► one of the engines that serve
        └──────── pauses, weights, aborts, checks, evaluations ──► each engine

A router chooses the engine, and nothing in an answer is its own. So every engine labels its weights with a tag of its
present life (``Engine.label``), which comes back with every answer: it says whom to credit or blame, and an answer of
weights that are no longer trusted belongs to nobody and is sampled again. Behind the router are the engines that serve
or pause for other weights, and no others: the controller keeps its list of workers.
"""

import asyncio
import logging

import msgspec

from asympo_megatron.errors import ControllerError, EngineError
from asympo_megatron.rollout.answer import Answer, AnswerReader, BadAnswer, GenerateRequest
from asympo_megatron.rollout.bell import Bell
from asympo_megatron.rollout.client import EngineClient, EngineLost
from asympo_megatron.rollout.fleet import Engine, EngineState, Fleet

log = logging.getLogger(__name__)
_ABORTS = 64
"""Requests that are being aborted at a time, each on every engine."""
_FIRST_PAUSE_S = 0.05
_POLL_S = 2.0
"""A router that was started again knows no workers; one that takes a worker in may do so late."""


class _Worker(msgspec.Struct):
    id: str
    url: str
    status: str = ""


class _Workers(msgspec.Struct):
    workers: list[_Worker]


class RouterClient(EngineClient):
    """Requests go to the router, their aborts to every engine that takes requests: a router passes none on.

    Args:
        url, api_key, request_timeout_s, control_timeout_s: see :class:`EngineClient`.
        fleet: the engines.
    """

    def __init__(
        self, url: str, api_key: str | None, request_timeout_s: float, control_timeout_s: float, fleet: Fleet
    ) -> None:
        super().__init__(url, api_key, request_timeout_s, control_timeout_s)
        self._api_key, self._fleet = api_key, fleet
        self._aborting = asyncio.Semaphore(_ABORTS)
        self._recall_until_s = 0.0
        self._recalling: asyncio.Task[None] | None = None

    def __str__(self) -> str:
        return f"router {self.url}"

    async def abort(self, rid_prefix: str) -> None:
        """End a request wherever it is; an engine that does not answer is its own lifecycle's concern."""
        async with self._aborting:
            taking = (EngineState.SERVING, EngineState.SYNCING)
            engines = [one for one in self._fleet.engines.values() if one.state in taking and one.failure is None]
            await asyncio.gather(*(one.client.abort(rid_prefix) for one in engines), return_exceptions=True)

    def recall(self) -> None:
        """End every request that is on its way, as if its time were over: each returns what it has and goes on.

        Some at a time: a request that is told has ``control_timeout_s`` to come back, and to tell thousands, each to
        every engine, takes longer than that.
        """
        loop = asyncio.get_running_loop()
        self._recall_until_s = loop.time()
        if self._recalling is None or self._recalling.done():
            self._recalling = loop.create_task(self._recall())

    async def close(self) -> None:
        """Close every connection; requests on their way fail with EngineLost."""
        if self._recalling is not None:
            self._recalling.cancel()
        await super().close()

    async def _recall(self) -> None:
        others = self._aborts.copy()
        while self._expiry.expire_oldest(_ABORTS, self._recall_until_s):
            await asyncio.gather(*(self._aborts - others), return_exceptions=True)
            others = self._aborts.copy()

    async def workers(self) -> dict[str, str]:
        """Id of every worker that gets requests, by url."""
        status, body = await self._call("GET", "/workers", None, self.control_timeout_s)
        if status in (401, 403, 404):
            raise ControllerError(
                f"{self}: /workers answered HTTP {status}. It takes a router with an interface for workers (sglang-"
                "router 0.3, smg) that accepts rollout.engine_api_key."
            )
        if status != 200:
            raise EngineError(f"{self}: /workers answered HTTP {status}: {body[:200]!r}")
        try:
            found = msgspec.json.decode(body, type=_Workers).workers
        except msgspec.DecodeError as error:
            raise EngineError(f"{self}: /workers cannot be read ({error}): {body[:200]!r}") from error
        return {worker.url.rstrip("/"): worker.id for worker in found if worker.status != "draining"}

    async def add_worker(self, url: str) -> None:
        """Ask for it; a router does it in its own time, or not at all while it cannot reach the engine."""
        worker = {"url": url} | ({"api_key": self._api_key} if self._api_key else {})
        status, body = await self._call("POST", "/workers", worker, self.control_timeout_s)
        if status not in (200, 201, 202):
            raise EngineError(f"{self}: POST /workers of {url} answered HTTP {status}: {body[:200]!r}")

    async def remove_worker(self, worker_id: str) -> None:
        """Ask for it; requests that the worker has go on."""
        status, body = await self._call("DELETE", f"/workers/{worker_id}", None, self.control_timeout_s)
        if status not in (200, 202, 204, 404):  # 404: it has gone
            raise EngineError(f"{self}: DELETE /workers/{worker_id} answered HTTP {status}: {body[:200]!r}")


class Router:
    """Training requests through the router, and its list of workers.

    Args:
        client: calls to it.
        fleet: the engines.
        patience_s: how long it may be out of reach.
    """

    def __init__(self, client: RouterClient, fleet: Fleet, patience_s: float) -> None:
        self._client, self._fleet, self._patience_s = client, fleet, patience_s
        self._members: set[str] = set()
        self._seen: set[str] = set()
        self._begun = self._done = 0
        """Looks at the router's list."""
        self._look_now = asyncio.Event()
        self._looked = Bell()

    async def close(self) -> None:
        """Close every connection."""
        await self._client.close()

    def join(self, url: str) -> None:
        """An engine serves: the router shall send requests to it."""
        if url not in self._members:
            self._members.add(url)
            self._look_now.set()

    async def leave(self, url: str) -> None:
        """An engine is not to be trusted: returns when the router sends it no request any more.

        Those that it may have are asked for again, for nobody knows which they are.
        """
        was_member = url in self._members
        self._members.discard(url)
        self._look_now.set()
        begun = self._begun
        await self._looked.until(lambda: self._done > begun and url not in self._seen)
        if was_member:
            self._client.recall()

    async def run(self) -> None:
        """Keep the router's list of workers what it shall be. Raises ControllerError when it is out of reach."""
        loop, pause_s = asyncio.get_running_loop(), _FIRST_PAUSE_S
        well_s = loop.time()
        while True:
            self._look_now.clear()
            try:
                await self._look()
                well_s = loop.time()
            except EngineError as error:
                log.log(logging.WARNING if pause_s == _POLL_S else logging.INFO, "%s", error)
                if loop.time() - well_s > self._patience_s:
                    raise ControllerError(
                        f"no use of the router for {self._patience_s:g} s (rollout.engine_start_timeout_s); last: "
                        f"{error}. Start it where it reaches the engines, or set rollout.router_url=null."
                    ) from error
            try:
                async with asyncio.timeout(pause_s):
                    await self._look_now.wait()
                pause_s = _FIRST_PAUSE_S
            except TimeoutError:
                pause_s = min(2 * pause_s, _POLL_S)

    async def _look(self) -> None:
        """Compare the router's list with ours, and ask for what differs.

        Raises:
            EngineError: it is out of reach, or has none of the engines that serve.
        """
        self._begun += 1
        begun, found = self._begun, dict[str, str]()
        try:
            found = await self._client.workers()
            self._done = begun
        finally:
            self._seen = set(found)
        self._looked.ring()
        for url in self._seen - self._members:
            await self._client.remove_worker(found[url])
        why = ""
        for url in self._members - self._seen:
            try:
                await self._client.add_worker(url)
            except EngineError as error:
                why = f" ({error})"
                log.info("%s", error)
        if self._members and self._members.isdisjoint(self._seen):
            raise EngineError(f"{self._client} has none of {', '.join(sorted(self._members))}{why}")

    async def ask(self, request: GenerateRequest, reader: AnswerReader) -> Answer:
        """One try of a request, once the router has an engine.

        Raises:
            RequestRefused: HTTP 400.
            EngineError: no answer that counts. The engine that gave a bad one is taken out of service; where it is not
                known, every engine is looked at.
        """
        await self._looked.until(lambda: not self._members.isdisjoint(self._seen))
        try:
            answer = await self._client.generate(request, reader)
            engine = self._sampled_by(answer.origin)
        except BadAnswer as error:
            culprit = self._fleet.named(error.origin)
            if culprit is None:
                self._fleet.suspect()
            else:
                self._fleet.fail(culprit, culprit.client, error)
            raise
        except EngineLost:
            self._client.abort_soon(request.rid)  # an engine may still be at work on it
            self._fleet.suspect()
            raise
        except EngineError:
            self._fleet.suspect()
            raise
        if answer.ids:
            engine.answered()
        return answer

    def _sampled_by(self, origin: str) -> Engine:
        engine = self._fleet.named(origin)
        if engine is None:
            raise BadAnswer(f"an engine that has failed, or is not of this run, sampled an answer (tag {origin!r})")
        return engine
