"""Commands of the controller: msgpack over HTTP, answered by threads beside the learner, or on an engine's host."""

import logging
import secrets
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec

from asympo_megatron.errors import AsympoError, PublishError
from asympo_megatron.protocol import ErrorReply

log = logging.getLogger(__name__)
_BODY_BYTES = 1 << 20
Calls = Mapping[str, tuple[type, Callable[[Any], Any]]]
"""Path -> the message it takes, and what answers it."""


class CommandServer:
    """Answers until it is closed.

    Args:
        host: address to listen on.
        token: bearer token that a caller must show; None: everybody may call.
        calls: what can be asked.
        port: 0 takes any free one.
    """

    def __init__(self, host: str, token: str | None, calls: Calls, port: int = 0) -> None:
        self._server = ThreadingHTTPServer((host, port), _handler(token, calls))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, name="weight-commands", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return self._server.server_address[1]

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()


def _handler(token: str | None, calls: Calls) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(min(int(self.headers.get("Content-Length", 0)), _BODY_BYTES))
            if not _authorized(token, self.headers.get("Authorization", "")):
                self._answer(
                    401, _problem(PublishError("wrong or missing bearer token: set rollout.controller_token."))
                )
                return
            if self.path not in calls:
                self._answer(404, _problem(PublishError(f"{self.path} is unknown; known: {', '.join(calls)}.")))
                return
            kind, call = calls[self.path]
            try:
                reply = call(msgspec.msgpack.decode(body, type=kind))
            except (AsympoError, msgspec.DecodeError, IndexError) as error:
                self._answer(400, _problem(error))
                return
            self._answer(200, {} if reply is None else reply)

        def log_message(self, format: str, *args: object) -> None:
            log.debug(format, *args)

        def _answer(self, status: int, content: object) -> None:
            data = msgspec.msgpack.encode(content)
            self.send_response(status)
            self.send_header("Content-Type", "application/msgpack")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return Handler


def _authorized(token: str | None, header: str) -> bool:
    return token is None or secrets.compare_digest(header.encode(), f"Bearer {token}".encode())


def _problem(error: Exception) -> ErrorReply:
    return ErrorReply(type(error).__name__, str(error))
