"""The scripted engine of a chaos run: a process that answers over HTTP, dies, stops, is slow, lies."""

import asyncio
from typing import Any

from aiohttp import web
from chaos_points import Points
from chaos_reward import SPELLS
from chaos_world import FIRST_SPELL, PROMPT_TOKENS, VOCABULARY, World, prompt_index, response_ids

from asympo_megatron.sync import verify_version
from asympo_megatron.testing.fake_engine import FakeEngine, FakeRequest

SLOW_S = 2.0
"""Added to one answer; less than request_timeout_s."""
WEIGHT_BYTES = 32


class ChaosEngine(FakeEngine):
    """Tokens as chaos_world has them, half of a response at a time; every answer is a point for a fault."""

    def __init__(self, world: World, index: int, points: Points) -> None:
        super().__init__(VOCABULARY, length=self._rest)
        self._world, self._points, self._port = world, points, world.engine_ports[index]
        self._timers: set[asyncio.Task[None]] = set()
        self._last_rid = ""
        self.hold(lambda body: max(0, self._rest(body) // 2))

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        self._points.reach("generate:before")
        kind = self._points.reach("generate:how")
        self.hangs = self.hangs or kind == "mute"
        body = await request.json()
        self._later(self._world.engine_latency_s + SLOW_S * (kind == "slow"), body["rid"])
        if kind == "ignores_abort":
            await asyncio.sleep(3 * self._world.engine_timeout_s)
        answer = await super()._generate(request)
        self._points.reach("generate:after")
        return answer

    async def _control(self, request: web.Request) -> web.Response:
        point = {"/pause_generation": "pause", "/continue_generation": "resume", "/update_weights_from_disk": "load"}
        name = point.get(request.path, "abort")
        self._points.reach(f"{name}:before")
        answer = await super()._control(request)
        self._points.reach(f"{name}:after")
        return answer

    async def _update(self, body: dict[str, Any]) -> web.Response:
        """Read the weights, as an engine does: they must be whole, and those that were announced."""
        manifest = verify_version(body["model_path"])
        with open(f"{body['model_path']}/model.safetensors", "rb") as file:
            held = file.read()[-WEIGHT_BYTES:].hex()
        self._points.reach("load:read")
        answer = await super()._update(body)
        self._points.note("loaded", version=int(self.version), manifest=manifest.checksum, checksum=held)
        return answer

    def _later(self, seconds: float, rid: str) -> None:
        async def release() -> None:
            await asyncio.sleep(seconds)
            await self.release(lambda running: running.rid == rid)

        task = asyncio.create_task(release())
        self._timers.add(task)
        task.add_done_callback(self._timers.discard)

    def _rest(self, body: dict[str, Any]) -> int:
        return len(_expected(body)) - (len(body["input_ids"]) - PROMPT_TOKENS)

    def _extend(self, running: FakeRequest, size: int) -> None:
        start, given = len(running.ids), len(running.body["input_ids"]) - PROMPT_TOKENS
        running.ids += _expected(running.body)[given + start : given + size]
        if size > start:
            running.spans.append({"version": self.label, "start": start, "end": size})

    def _answer(self, request: web.Request, running: FakeRequest) -> web.Response:
        kind = self._points.reach("answer:how")
        if kind is not None and not running.aborted:
            self.misbehave(self._lie(kind, running), lambda body: body is running.body)
        self._last_rid = running.rid
        return super()._answer(request, running)

    def _lie(self, kind: str, running: FakeRequest) -> Any:
        def lie(answer: dict[str, Any]) -> Any:
            if kind == "http_500":
                return 500
            if kind == "reset":
                return None
            if kind == "truncated":
                return b'{"text":"","output_ids":[1,2'
            if kind == "wrong_ids":
                answer["output_ids"] = [VOCABULARY + 5] * len(running.ids)
            elif kind == "duplicate_rid":  # the answer to another request, once more
                answer["meta_info"]["id"] = self._last_rid
            elif kind in SPELLS:
                answer["output_ids"] = [*running.ids[:-1], FIRST_SPELL + SPELLS.index(kind)]
            return answer

        return lie


def _expected(body: dict[str, Any]) -> list[int]:
    row = int(body["rid"].split(".")[3])
    return response_ids(prompt_index(body["input_ids"][:PROMPT_TOKENS]), row)


async def _serve(world: World, index: int, points: Points) -> None:
    await ChaosEngine(world, index, points).start()
    points.note("listening")
    await asyncio.Event().wait()


def run_engine(world: World, index: int) -> None:
    """Until the process is ended."""
    asyncio.run(_serve(world, index, Points(world.path, f"engine{index}")))
