"""One engine over HTTP: the SGLang calls the controller makes, each with a deadline and an engine-labelled error."""

import asyncio
import logging
from contextlib import suppress
from typing import Any

import aiohttp
import msgspec
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_exponential
from yarl import URL

from asympo_megatron.errors import EngineError
from asympo_megatron.rollout.answer import Answer, AnswerReader, BadAnswer, GenerateRequest
from asympo_megatron.rollout.expiry import Expiring, Expiry

log = logging.getLogger(__name__)
_KEEPALIVE_S = 2.0
"""Below uvicorn's 5 s: a server must not close an idle connection while a request is on its way into it."""
_CLOSE_S = 1.0
_SKIPPED_HEADERS = ("User-Agent", "Accept", "Accept-Encoding")


class EngineLost(EngineError):
    """The connection failed: the engine may be gone, or only this connection."""


class RequestRefused(EngineError):
    """The engine says that the request itself is wrong (HTTP 400): no other engine would take it."""


class EngineClient:
    """Calls to one engine. Must be made inside a running event loop.

    Args:
        url: e.g. ``http://10.0.0.7:30000``.
        api_key: SGLang's ``--api-key``, or None.
        request_timeout_s: after this a request is aborted on the engine, which then returns what it has.
        control_timeout_s: deadline of every call but ``/generate`` and weight updates.
    """

    def __init__(self, url: str, api_key: str | None, request_timeout_s: float, control_timeout_s: float) -> None:
        self.url = url.rstrip("/")
        self._generate_url = URL(self.url + "/generate")
        self.control_timeout_s = control_timeout_s
        headers = {"Content-Type": "application/json"}
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None),
            headers=headers,
            skip_auto_headers=_SKIPPED_HEADERS,
        )
        self._aborts: set[asyncio.Task[None]] = set()
        self._expiry: Expiry[_Limit] = Expiry(request_timeout_s)

    def __str__(self) -> str:
        return f"engine {self.url}"

    async def close(self) -> None:
        """Close every connection; requests on their way fail with EngineLost.

        Those that are still connecting or being sent end by their deadline: closing the session leaves them waiting for
        a peer that may never take another byte. So may the connection itself, which the system ends in its own time.
        """
        now_s = asyncio.get_running_loop().time()
        for limit in self._expiry.close():
            limit.deadline.reschedule(now_s)
        for task in self._aborts:
            task.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_S):
                await self._session.close()

    async def generate(self, request: GenerateRequest, reader: AnswerReader) -> Answer:
        """Sample one response. Never retried here: the caller decides where it goes on.

        Raises:
            RequestRefused: HTTP 400.
            EngineLost: no connection, or no answer in time even after an abort.
            BadAnswer: an answer that fails its checks.
            EngineError: any other status.
        """
        limit = _Limit(self, request.rid)
        self._expiry.add(limit)
        try:
            async with (
                limit.deadline,
                self._session.post(self._generate_url, data=msgspec.json.encode(request)) as reply,
            ):
                status, body = reply.status, await reply.read()
        except asyncio.CancelledError:
            self.abort_soon(request.rid)
            raise
        except (aiohttp.ClientError, OSError, TimeoutError, RuntimeError) as error:  # RuntimeError: session is closed
            raise EngineLost(f"{self}: /generate failed ({_describe(error)})") from error
        finally:
            self._expiry.remove(limit)
        if status == 400:
            raise RequestRefused(f"{self} refused a request: {body[:300].decode(errors='replace')}")
        if status != 200:
            raise EngineError(f"{self}: /generate answered HTTP {status}: {body[:200]!r}")
        try:
            answer = reader.read(body, request)
        except BadAnswer as error:
            raise BadAnswer(f"{self}: {error}", error.origin) from error
        return msgspec.structs.replace(answer, expired=True) if limit.expired else answer

    async def ready(self) -> None:
        """Raises EngineError while the engine does not take requests.

        Two kinds are never ready by themselves, and are helped: one that is paused, as a failed update or a controller
        that died in one leaves it, is told to go on; one that failed a health check is asked for a token again.
        """
        status, body = await self._call("GET", "/ready", None, self.control_timeout_s)
        if status == 404:  # older servers have only /model_info
            await self.weight_label()
        elif status != 200:
            await self._call("POST", "/continue_generation", {}, self.control_timeout_s)
            await self.check_generates(self.control_timeout_s)
            raise EngineError(f"{self}: /ready answered HTTP {status}: {body[:200]!r}")

    async def weight_label(self, attempts: int = 1, timeout_s: float | None = None) -> str:
        """The weight version that the engine reports; ``timeout_s``: of each attempt, by default that of every call."""
        body = await self._control("GET", "/model_info", None, attempts, timeout_s)
        try:
            return str(msgspec.json.decode(body, type=dict[str, Any])["weight_version"])
        except (msgspec.DecodeError, KeyError) as error:
            raise EngineError(f"{self}: /model_info has no weight_version: {body[:200]!r}") from error

    async def check_generates(self, timeout_s: float) -> None:
        """Raises EngineError unless the engine samples a token: one that hangs may well answer every other call.

        A real server answers as soon as anything comes out of its scheduler, so a busy one samples no token for this.
        """
        try:
            status, body = await self._call("GET", "/health_generate", None, timeout_s)
        except EngineLost as error:
            raise EngineError(f"{self} generates nothing: {error}") from error
        if status not in (200, 404):  # 404: too old to be asked
            raise EngineError(f"{self} generates nothing: /health_generate answered HTTP {status}: {body[:200]!r}")

    async def pause(self, mode: str) -> None:
        """Stop generating; new requests wait in the engine."""
        await self._control("POST", "/pause_generation", {"mode": mode})

    async def resume(self) -> None:
        """Go on after a pause."""
        await self._control("POST", "/continue_generation", {})

    async def abort(self, rid_prefix: str) -> None:
        """End every request whose id begins with ``rid_prefix``; each answers with the tokens it has."""
        await self._control("POST", "/abort_request", {"rid": rid_prefix})

    def abort_soon(self, rid: str) -> None:
        """The same without waiting for it; a failure is logged."""
        task = asyncio.get_running_loop().create_task(self._abort_quietly(rid))
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)

    async def update_weights(self, path: str, label: str, *, flush_cache: bool, timeout_s: float) -> None:
        """Load the weights under ``path``. Not retried: what a failed load left behind is unknown."""
        payload = {"model_path": path, "weight_version": label, "flush_cache": flush_cache}
        payload["load_format"] = "auto"  # by default a server loads as it was started: dummy, when by `asympo run`
        await self.update_call("/update_weights_from_disk", payload, timeout_s)

    async def update_call(self, path: str, payload: dict[str, Any], timeout_s: float) -> None:
        """One call of a weight update, never retried: it must answer 200 and say success."""
        status, body = await self._call("POST", path, payload, timeout_s)
        if status != 200 or not _success(body):
            raise EngineError(f"{self} refused {path}: HTTP {status}: {body[:300]!r}")

    async def begin_update(self, timeout_s: float) -> bool:
        """Open a session of weight updates; False where the server is too old to have any.

        A session that a crash has left open is ended first: what it loaded is overwritten now.
        """
        status, body = await self._call("POST", "/begin_weight_update", {}, timeout_s)
        if status == 404:
            return False
        if status == 400:
            await self.update_call("/end_weight_update", {}, timeout_s)
            await self.update_call("/begin_weight_update", {}, timeout_s)
        elif status != 200:
            raise EngineError(f"{self}: /begin_weight_update answered HTTP {status}: {body[:200]!r}")
        return True

    async def tensor_parallel_size(self) -> int:
        """Ranks of the engine that take part in a collective update."""
        body = await self._control("GET", "/server_info", None)
        try:
            return int(msgspec.json.decode(body, type=dict[str, Any]).get("tp_size", 1))
        except (msgspec.DecodeError, TypeError, ValueError) as error:
            raise EngineError(f"{self}: /server_info cannot be read: {body[:200]!r}") from error

    async def destroy_group(self, name: str) -> None:
        """Leave a process group."""
        await self._call("POST", "/destroy_weights_update_group", {"group_name": name}, self.control_timeout_s)

    async def _control(
        self, method: str, path: str, payload: Any, attempts: int = 3, timeout_s: float | None = None
    ) -> bytes:
        retrying = AsyncRetrying(
            retry=retry_if_exception(_lost_at_once),
            stop=stop_after_attempt(attempts),
            wait=wait_exponential(multiplier=0.05, max=1.0),
            reraise=True,
        )
        deadline_s = self.control_timeout_s if timeout_s is None else timeout_s
        reply: tuple[int, bytes] = await retrying(self._call, method, path, payload, deadline_s)
        status, body = reply
        if status != 200:
            raise EngineError(f"{self}: {path} answered HTTP {status}: {body[:200]!r}")
        return body

    async def _call(self, method: str, path: str, payload: Any, timeout_s: float) -> tuple[int, bytes]:
        data = None if payload is None else msgspec.json.encode(payload)
        try:
            async with asyncio.timeout(timeout_s), self._session.request(method, self.url + path, data=data) as reply:
                return reply.status, await reply.read()
        except (aiohttp.ClientError, OSError, TimeoutError, RuntimeError) as error:
            raise EngineLost(f"{self}: {path} failed ({_describe(error)})") from error

    async def _abort_quietly(self, rid: str) -> None:
        try:
            await self.abort(rid)
        except EngineError as error:
            log.warning("%s", error)


class _Limit(Expiring):
    """A request's time: when it is over, the engine is asked for what it has, and must answer soon."""

    __slots__ = ("_client", "_rid", "deadline", "expired")

    def __init__(self, client: EngineClient, rid: str) -> None:
        self._client, self._rid, self.expired = client, rid, False
        self.deadline = asyncio.timeout(None)  # set when it is near: a timer for each of thousands of requests costs

    def expire(self) -> None:
        self.expired = True
        self._client.abort_soon(self._rid)
        self.deadline.reschedule(asyncio.get_running_loop().time() + self._client.control_timeout_s)


def _lost_at_once(error: BaseException) -> bool:
    """Whether asking again may help: an engine that was silent until the deadline has had its time."""
    return isinstance(error, EngineLost) and not isinstance(error.__cause__, TimeoutError)


def _success(body: bytes) -> bool:
    try:
        return bool(msgspec.json.decode(body, type=dict[str, Any]).get("success"))
    except msgspec.DecodeError:
        return False


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
