"""The controller over HTTP: msgpack for the trainer, JSON for people."""

import hmac
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import web

from asympo_megatron import protocol
from asympo_megatron.errors import AsympoError, ControllerError, JournalError, StaleIncarnationError
from asympo_megatron.rollout.controller import Controller

log = logging.getLogger(__name__)
_BODY_BYTES = 64 << 20
_CONFLICTS = (StaleIncarnationError, JournalError)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class _EngineJoin(msgspec.Struct):
    url: str


def build_app(controller: Controller, token: str | None, on_failure_told: Callable[[], None]) -> web.Application:
    """The application of a controller.

    Args:
        controller: answers.
        token: bearer token that every call but /healthz must carry; None: everybody may call.
        on_failure_told: called when a trainer was told that the controller failed.
    """
    calls: dict[str, tuple[type, Callable[[Any], Awaitable[Any]]]] = {
        "/attach": (protocol.AttachRequest, controller.attach),
        "/lease": (protocol.LeaseRequest, controller.lease),
        "/payload": (protocol.PayloadRequest, controller.payload),
        "/version": (protocol.VersionRequest, controller.version),
        "/publish": (protocol.PublishRequest, controller.publish),
        "/commit": (protocol.CommitRequest, controller.commit),
        "/finish": (protocol.FinishRequest, controller.finish),
    }
    app = web.Application(client_max_size=_BODY_BYTES, middlewares=[_authorize(token)])
    for path, (kind, method) in calls.items():
        app.router.add_post(path, _call(controller, kind, method, on_failure_told))
    app.router.add_get("/status", lambda _: _json(controller.status()))
    app.router.add_get("/healthz", lambda _: _json({"ok": controller.failure is None}, controller.failure is None))
    app.router.add_post("/engines", _join(controller))
    return app


def _call(
    controller: Controller, kind: type, method: Callable[[Any], Awaitable[Any]], on_failure_told: Callable[[], None]
) -> Handler:
    decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(kind)

    async def handle(request: web.Request) -> web.Response:
        try:
            reply = await method(decoder.decode(await request.read()))
        except msgspec.DecodeError as error:
            return _error(400, ControllerError(f"{request.path}: body is not a {kind.__name__}: {error}."))
        except AsympoError as error:
            if controller.failure is not None:
                on_failure_told()
                return _error(500, error)
            return _error(409 if isinstance(error, _CONFLICTS) else 400, error)
        except Exception as error:
            log.exception("%s failed", request.path)
            return _error(
                500, ControllerError(f"{request.path} failed in the controller: {type(error).__name__}: {error}")
            )
        return web.Response(
            body=msgspec.msgpack.encode({} if reply is None else reply), content_type="application/msgpack"
        )

    return handle


def _join(controller: Controller) -> Handler:
    async def handle(request: web.Request) -> web.Response:
        try:
            controller.join_engine(msgspec.json.decode(await request.read(), type=_EngineJoin).url)
        except (msgspec.DecodeError, ControllerError) as error:
            return web.json_response({"error": str(error)}, status=400)
        return web.json_response({"engines": controller.status()["engines"]})

    return handle


def _authorize(token: str | None) -> Any:
    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if token is not None and request.path != "/healthz":
            given = request.headers.get("Authorization", "")
            if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
                return _error(401, ControllerError("wrong or missing bearer token: set rollout.controller_token."))
        return await handler(request)

    return check


async def _json(content: Any, good: bool = True) -> web.Response:
    return web.Response(body=msgspec.json.encode(content), content_type="application/json", status=200 if good else 500)


def _error(status: int, error: AsympoError) -> web.Response:
    body = msgspec.msgpack.encode(protocol.ErrorReply(type(error).__name__, str(error)))
    return web.Response(body=body, status=status, content_type="application/msgpack")
