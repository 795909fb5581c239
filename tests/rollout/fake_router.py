"""A scripted router: the interface of sglang-router and smg that the controller uses, in front of fake engines."""

import asyncio
import contextlib
import itertools
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import orjson
from aiohttp import web
from rollout_world import VOCAB, World, small_config, world

from asympo_megatron.rollout.fleet import Fleet
from asympo_megatron.testing.fake_engine import FakeEngine

_KEPT = ("rid", "input_ids", "sampling_params", "return_logprob", "extra_key")
"""A real router builds the body anew from the fields that it knows."""


class FakeRouter:
    """One router on loopback.

    Args:
        choose: takes the urls of the workers and names one; by default they take turns.
        api_key: expected bearer token.
    """

    def __init__(self, choose: Callable[[list[str]], str] | None = None, api_key: str | None = None) -> None:
        self._choose, self._api_key = choose, api_key
        self._turns = itertools.count()
        self.workers: dict[str, str] = {}
        self.keys: dict[str, str | None] = {}
        self.sent: list[tuple[str, dict[str, Any]]] = []
        """Worker and body of every request."""
        self.log: list[str] = []
        """What happened to the list of workers; tests write their own lines between."""
        self.in_flight = self.most_in_flight = 0
        self.refusals: list[int] = []
        """Statuses of the next answers."""
        self.removals = asyncio.Event()
        """Not set: workers stay, although their removal was accepted."""
        self.removals_asked = 0
        self.removing: int | None = None
        """Status of every answer to a removal, which is not done."""
        self.adding: int | None = None
        """Status of every answer to a new worker, which is not taken in."""
        self.left_behind: str | None = None
        """A worker that it has from the start."""
        self.removals.set()
        self.at_first = 1
        """Requests wait until so many workers have joined."""
        self._joined = asyncio.Event()
        self._port = 0

    async def start(self) -> str:
        """Listen, on the same port as before, with no workers."""
        self.workers.clear()
        self._joined.clear()
        if self.left_behind is not None:
            self.workers[self.left_behind] = str(uuid.uuid4())
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        app = web.Application()
        app.router.add_post("/generate", self._generate)
        app.router.add_get("/workers", self._list)
        app.router.add_post("/workers", self._add)
        app.router.add_delete("/workers/{worker}", self._remove)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.01)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True, shutdown_timeout=0.01).start()
        self._port = int(self._runner.addresses[0][1])
        return f"http://127.0.0.1:{self._port}"

    async def stop(self) -> None:
        await self._session.close()
        await self._runner.cleanup()

    async def _list(self, request: web.Request) -> web.Response:
        self._check(request)
        workers = [{"id": worker, "url": url, "is_healthy": True} for url, worker in self.workers.items()]
        return web.json_response({"workers": workers, "total": len(workers)})

    async def _add(self, request: web.Request) -> web.Response:
        self._check(request)
        body = await request.json()
        if self.adding is not None:
            return web.json_response({"status": "armed"}, status=self.adding)
        self.keys[body["url"]] = body.get("api_key")
        if body["url"] not in self.workers:
            self.workers[body["url"]] = str(uuid.uuid4())
            self.log.append(f"added {body['url']}")
        if len(self.workers) >= self.at_first:
            self._joined.set()
        return web.json_response({"status": "accepted"}, status=202)

    async def _remove(self, request: web.Request) -> web.Response:
        self._check(request)
        self.removals_asked += 1
        if self.removing is not None:
            return web.json_response({"error": "armed refusal"}, status=self.removing)
        for url, worker in list(self.workers.items()):
            if worker == request.match_info["worker"] and self.removals.is_set():
                del self.workers[url]
                self.log.append(f"removed {url}")
        return web.json_response({"status": "accepted"}, status=202)

    async def _generate(self, request: web.Request) -> web.Response:
        self._check(request)
        body = orjson.loads(await request.read())
        if self.refusals:
            return web.json_response({"error": "armed refusal"}, status=self.refusals.pop(0))
        await self._joined.wait()
        workers = sorted(self.workers)
        if not workers:
            return web.json_response({"error": "no_available_workers"}, status=503)
        url = self._choose(workers) if self._choose else workers[next(self._turns) % len(workers)]
        self.sent.append((url, body))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        headers = {name: request.headers[name] for name in ("Authorization",) if name in request.headers}
        try:
            kept = {name: body[name] for name in _KEPT if name in body}
            async with self._session.post(url + "/generate", data=orjson.dumps(kept), headers=headers) as reply:
                return web.Response(status=reply.status, body=await reply.read(), content_type="application/json")
        except aiohttp.ClientError:
            return web.json_response({"error": "send_request_error"}, status=502)
        finally:
            self.in_flight -= 1

    def _check(self, request: web.Request) -> None:
        if self._api_key is not None and request.headers.get("Authorization") != f"Bearer {self._api_key}":
            raise web.HTTPUnauthorized


@contextlib.asynccontextmanager
async def routed_world(
    run_dir: Path, router: FakeRouter, engines: list[FakeEngine] | None = None, **changes: Any
) -> AsyncIterator[World]:
    """A run whose training requests go through ``router``, which is started, to two engines."""
    engines = [FakeEngine(VOCAB), FakeEngine(VOCAB)] if engines is None else engines
    router.at_first = len(engines)
    changes = {"sync__pause_mode": "retract", "rollout__router_url": await router.start()} | changes
    try:
        async with world(run_dir, small_config(**changes), engines) as w:
            yield w
    finally:
        await router.stop()


async def train(w: World, steps: int, *, begin: bool = False) -> list[tuple[int, int]]:
    """Lease and publish; every trained response holds what its weights sample. Returns group and row of each."""
    if begin:
        await w.trainer.attach()
        await w.trainer.publish(0)
    trained = []
    for step in range(steps):
        reply = await w.trainer.lease(step)
        trained += [(row.group_id, row.row) for row in reply.responses]
        for sample in await w.trainer.payload(reply):
            assert sample.ids == expected(sample.prompt_ids, sample.versions), sample
        await w.trainer.publish(step + 1)
    return trained


def expected(prompt_ids: list[int], versions: list[Any]) -> list[int]:
    """What the fake engine samples: a function of prompt, position and version, by segments of requests."""
    seeds = [span.version for span in versions for _ in range(span.start, span.end)]
    return [(sum(prompt_ids) + 7 * k + 13 * seed) % VOCAB for k, seed in enumerate(seeds)]


def each(steps: int) -> list[tuple[int, int]]:
    return [(group, row) for group in range(2 * steps) for row in range(2)]


def calls(engine: FakeEngine, path: str) -> list[dict[str, Any]]:
    return [body for called, body in engine.calls if called == path]


def fleet(w: World) -> Fleet:
    return w.controller.parts.fleet
