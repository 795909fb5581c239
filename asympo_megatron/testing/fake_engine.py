"""A scripted engine that speaks SGLang's protocol over real HTTP: for tests of whoever talks to engines.

Nothing in it waits for time: requests are held and released, failures are armed, and :meth:`FakeEngine.until` waits
for what the test wants to see. Tokens are a fixed function of prompt, position and weight version.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import orjson
from aiohttp import web

_SAMPLING_FIELDS = {
    "max_new_tokens", "temperature", "top_p", "top_k", "stop_token_ids", "skip_special_tokens", "ignore_eos",
}  # fmt: skip
Garbage = Callable[[dict[str, Any]], Any]


@dataclass(eq=False)
class FakeRequest:
    """A request inside the engine."""

    body: dict[str, Any]
    label: str
    ids: list[int] = field(default_factory=list)
    spans: list[dict[str, Any]] = field(default_factory=list)
    held: bool = False
    aborted: bool = False

    @property
    def rid(self) -> str:
        return str(self.body["rid"])


class FakeEngine:
    """One engine on loopback.

    Args:
        vocab_size: ids outside of it kill the engine, as they kill a real one.
        length: tokens of a response, given its request; default 4. Reaching it finishes by "stop" unless it is
            max_new_tokens, which finishes by "length".
        api_key: expected bearer token.
    """

    def __init__(
        self, vocab_size: int = 64, length: Callable[[dict[str, Any]], int] | None = None, api_key: str | None = None
    ) -> None:
        self.vocab_size, self._length, self._api_key = vocab_size, length or (lambda _: 4), api_key
        self.label = "default"
        self.paused = False
        self.is_ready = True
        self.hangs = False
        self.unhealthy = False
        self.requests: list[dict[str, Any]] = []
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.running: dict[str, FakeRequest] = {}
        self.cache_keys: set[str] = set()
        self._hold: Callable[[dict[str, Any]], int | None] = lambda _: None
        self._garbage: deque[tuple[Callable[[dict[str, Any]], bool], Garbage]] = deque()
        self._failing_updates: deque[str] = deque()
        self._update_gate: asyncio.Event | None = None
        self._changed = asyncio.Condition()
        self._runner: web.AppRunner | None = None
        self._port = 0

    # -- life

    async def start(self) -> str:
        """Listen (on the same port as before, if any); returns the url."""
        app = web.Application()
        app.router.add_post("/generate", self._generate)
        for path in ("/pause_generation", "/continue_generation", "/abort_request", "/update_weights_from_disk"):
            app.router.add_post(path, self._control)
        app.router.add_get("/ready", self._ready)
        app.router.add_get("/health_generate", self._health_generate)
        app.router.add_get("/model_info", self._model_info)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.01)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True, shutdown_timeout=0.01)
        await site.start()
        self._port = int(self._runner.addresses[0][1])
        return self.url

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def version(self) -> str:
        """Its label without the tag."""
        return self.label.partition(".")[0]

    async def kill(self) -> None:
        """Die at once: every connection is cut, no request is answered."""
        runner, self._runner = self._runner, None
        if runner is None:
            return
        if runner.server is not None:
            for connection in list(runner.server.connections):  # type: ignore[attr-defined]
                if connection.transport is not None:
                    connection.transport.abort()
        await runner.cleanup()

    async def restart(self) -> None:
        """Come back on the same port with fresh, unlabelled weights."""
        await self.kill()
        self.label, self.paused, self.hangs, self.unhealthy = "default", False, False, False
        self.running.clear()
        await self.start()

    # -- script

    def hold(self, after: Callable[[dict[str, Any]], int | None]) -> None:
        """Requests for which ``after(body)`` is a number stop after that many tokens until :meth:`release`."""
        self._hold = after

    async def release(self, which: Callable[[FakeRequest], bool] = lambda _: True) -> None:
        """Let held requests go on, with the weights of now."""
        async with self._changed:
            for request in self.running.values():
                if which(request):
                    request.held = False
            self._changed.notify_all()

    def misbehave(self, how: Garbage, which: Callable[[dict[str, Any]], bool] = lambda _: True) -> None:
        """The next matching answer becomes ``how(answer)``: a changed dict, bytes, an int (HTTP status), or None
        (the connection is cut)."""
        self._garbage.append((which, how))

    def fail_next_update(self, message: str = "out of memory") -> None:
        """The next weight update answers HTTP 400."""
        self._failing_updates.append(message)

    def hold_updates(self) -> asyncio.Event:
        """Weight updates wait until the returned event is set."""
        self._update_gate = asyncio.Event()
        return self._update_gate

    async def until(self, condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
        """Wait until the engine looks as the test wants."""
        async with asyncio.timeout(timeout_s), self._changed:
            await self._changed.wait_for(condition)

    # -- protocol

    async def _ready(self, request: web.Request) -> web.Response:
        await self._note("/ready", {})
        takes_requests = self.is_ready and not self.paused and not self.unhealthy
        return web.Response(status=200 if takes_requests and self._authorized(request) else 503)

    async def _health_generate(self, request: web.Request) -> web.Response:
        """As the real one: a token waits out a pause; when none comes it is not ready until one does."""
        await self._note("/health_generate", {})
        async with self._changed:
            await self._changed.wait_for(lambda: self.hangs or not self.paused)
        self.unhealthy = self.hangs
        return web.Response(status=503 if self.unhealthy else 200)

    async def _model_info(self, request: web.Request) -> web.Response:
        if not self._authorized(request):
            return web.Response(status=401)
        await self._note("/model_info", {})
        return _json({"model_path": "/model", "weight_version": self.label, "is_generation": True})

    async def _control(self, request: web.Request) -> web.Response:
        if not self._authorized(request):
            return web.Response(status=401)
        body = orjson.loads(await request.read() or b"{}")
        await self._note(request.path, body)
        if request.path == "/update_weights_from_disk":
            return await self._update(body)
        async with self._changed:
            if request.path == "/pause_generation":
                self.paused = True
                if body.get("mode") == "abort":
                    self._abort("")
            elif request.path == "/continue_generation":
                self.paused = False
            else:
                self._abort(body["rid"])
            self._changed.notify_all()
        return _json({"status": "ok"}) if request.path != "/abort_request" else web.Response()

    async def _update(self, body: dict[str, Any]) -> web.Response:
        if self._update_gate is not None:
            await self._update_gate.wait()
        if body.get("load_format") != "auto":
            return _json({"success": False, "message": "Failed to get model loader"}, 400)
        if self._failing_updates:
            return _json({"success": False, "message": self._failing_updates.popleft()}, 400)
        if body["flush_cache"] and any(not one.aborted for one in self.running.values()) and not self.paused:
            return _json({"success": False, "message": "cache cannot be flushed while requests run"}, 400)
        async with self._changed:
            self.label = body["weight_version"]
            if body["flush_cache"]:
                self.cache_keys.clear()
            self._changed.notify_all()
        return _json({"success": True, "message": "loaded", "num_paused_requests": 0})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        if not self._authorized(request):
            return web.Response(status=401)
        body = orjson.loads(await request.read())
        unknown = set(body["sampling_params"]) - _SAMPLING_FIELDS
        if unknown:
            return _json({"error": f"unknown field `{unknown.pop()}`"}, 400)
        if any(not 0 <= token < self.vocab_size for token in body["input_ids"]):
            await self.kill()
            raise ConnectionResetError("token id outside the vocabulary")
        async with self._changed:
            self.requests.append(body)
            self._changed.notify_all()
            await self._changed.wait_for(lambda: not self.paused and not self.hangs)
            running = self.running[body["rid"]] = FakeRequest(body, self.label)
            self.cache_keys.add(body.get("extra_key", ""))
            try:
                await self._sample(running)
            finally:
                self.running.pop(body["rid"], None)
                self._changed.notify_all()
        return self._answer(request, running)

    async def _sample(self, running: FakeRequest) -> None:
        goal = min(self._length(running.body), running.body["sampling_params"]["max_new_tokens"])
        stop_at = self._hold(running.body)
        if stop_at is not None:
            self._extend(running, min(stop_at, goal))
            running.held = True
            self._changed.notify_all()
            await self._changed.wait_for(lambda: running.aborted or (not running.held and not self.paused))
        if not running.aborted:
            self._extend(running, goal)

    def _extend(self, running: FakeRequest, size: int) -> None:
        start = len(running.ids)
        prompt = sum(running.body["input_ids"])
        seed = int(self.version) if self.version.isdecimal() else 0
        running.ids += [(prompt + 7 * k + 13 * seed) % self.vocab_size for k in range(start, size)]
        if size > start:
            running.spans.append({"version": self.label, "start": start, "end": size})

    def _answer(self, request: web.Request, running: FakeRequest) -> web.Response:
        most = running.body["sampling_params"]["max_new_tokens"]
        kind = "abort" if running.aborted else "length" if len(running.ids) >= most else "stop"
        answer: Any = {
            "text": "",
            "output_ids": running.ids,
            "meta_info": {
                "id": running.rid,
                "finish_reason": {"type": kind},
                "prompt_tokens": len(running.body["input_ids"]),
                "weight_version": self.label,
                "weight_versions": running.spans,
                "completion_tokens": len(running.ids),
            },
        }
        if running.body.get("return_logprob"):
            answer["meta_info"]["output_token_logprobs"] = [[-0.5, token, None] for token in running.ids]
        for arm in list(self._garbage):
            if arm[0](running.body):
                self._garbage.remove(arm)
                answer = arm[1](answer)
                break
        if answer is None:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if isinstance(answer, int):
            return web.Response(status=answer, text="armed failure")
        return (
            web.Response(body=answer, content_type="application/json") if isinstance(answer, bytes) else _json(answer)
        )

    def _abort(self, prefix: str) -> None:
        for running in self.running.values():
            if running.rid.startswith(prefix):
                running.aborted = True

    async def _note(self, path: str, body: dict[str, Any]) -> None:
        async with self._changed:
            self.calls.append((path, body))
            self._changed.notify_all()

    def _authorized(self, request: web.Request) -> bool:
        return self._api_key is None or request.headers.get("Authorization") == f"Bearer {self._api_key}"


def _json(content: Any, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(content), status=status, content_type="application/json")
