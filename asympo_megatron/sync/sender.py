"""The trainer's end of the collective transport: weights in buckets, handed to one engine at a time on command.

    trainer            store(version, tensors) ── gather, tensor by tensor, into a spool; the learner goes on
    controller (HTTP)  /join a group ─► /send each bucket ─► /leave             engine receives beside it

Every engine has a process group and a thread of its own here: a dead one times out alone.
"""

import logging
import secrets
import threading
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import torch.distributed as dist
from torch import Tensor

from asympo_megatron import protocol
from asympo_megatron.errors import AsympoError, PublishError
from asympo_megatron.sync.group import WeightGroup, join_group, open_store
from asympo_megatron.sync.spool import Spool, spool_version

log = logging.getLogger(__name__)
_BODY_BYTES = 1 << 20


@dataclass
class _Channel:
    """One engine's group; joined by a thread, because both sides must come at the same time."""

    spool: Spool
    store: dist.TCPStore
    joined: threading.Event = field(default_factory=threading.Event)
    group: WeightGroup | None = None
    problem: str = ""


class WeightSender:
    """Keeps published versions in spools and broadcasts their buckets.

    Args:
        host: address to listen on, and of every group's meeting point.
        token: bearer token that the controller must show; None: everybody may call.
        backend: gloo | nccl.
        bucket_bytes: largest bucket, except where one tensor alone is larger.
        timeout_s: deadline of a join and of one bucket.
        folder: where spools lie; None takes the system's temporary directory.
    """

    def __init__(
        self,
        host: str,
        token: str | None,
        backend: str,
        bucket_bytes: int,
        timeout_s: float,
        folder: str | Path | None = None,
    ) -> None:
        self._host, self._backend, self._folder = host, backend, folder
        self._bucket_bytes, self._timeout_s = bucket_bytes, timeout_s
        self._versions: dict[int, Spool] = {}
        self._channels: dict[str, _Channel] = {}
        self._secret = token
        self._server = ThreadingHTTPServer((host, 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, name="weight-sender", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """``collective://HOST:PORT``, which a published version names in place of a directory."""
        return f"{protocol.COLLECTIVE}{self._host}:{self._server.server_address[1]}"

    def store(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take a version in, one tensor in hand at a time.

        Raises:
            PublishError: see :func:`~asympo_megatron.sync.spool.spool_version`.
        """
        self._versions[version] = spool_version(tensors, self._bucket_bytes, self._folder)

    def keep(self, versions: Collection[int]) -> None:
        """Forget all other versions; a transfer under way keeps what it sends."""
        for version in [known for known in self._versions if known not in versions]:
            del self._versions[version]

    def close(self) -> None:
        """Stop answering; groups end."""
        self._server.shutdown()
        self._server.server_close()
        for name in list(self._channels):
            self.leave(protocol.LeaveGroupRequest(name))

    def join(self, request: protocol.JoinGroupRequest) -> protocol.JoinGroupReply:
        """Open a group of which this process is rank 0. Answers at once; the engine may come now."""
        spool = self._spool(request.version)
        channel = _Channel(spool, open_store(self._host, self._timeout_s))
        self._channels[request.group] = channel
        threading.Thread(target=self._meet, args=(request, channel), name=request.group, daemon=True).start()
        return protocol.JoinGroupReply(self._host, channel.store.port, self._backend, spool.buckets)

    def send(self, request: protocol.SendBucketRequest) -> None:
        """Broadcast one bucket; returns when it is out.

        Raises:
            PublishError: no such group or version, the engine did not come, or the deadline passed.
        """
        channel = self._channels.get(request.group)
        if channel is None:
            raise PublishError(f"group {request.group} is not open; join it first.")
        if not channel.joined.wait(self._timeout_s):
            raise PublishError(f"the engine did not join group {request.group} within {self._timeout_s:g} s.")
        if channel.group is None:
            raise PublishError(f"group {request.group} was not joined: {channel.problem}")
        try:
            channel.group.broadcast(channel.spool.bucket(request.bucket).to(channel.group.device))
        except RuntimeError as error:
            raise PublishError(f"bucket {request.bucket} was not sent in group {request.group}: {error}") from error

    def leave(self, request: protocol.LeaveGroupRequest) -> None:
        """End a group, whatever it is doing; an unknown one is no error."""
        channel = self._channels.pop(request.group, None)
        if channel is not None and channel.group is not None:
            channel.group.abort()

    def authorized(self, header: str) -> bool:
        """Whether a request's Authorization header may command this sender."""
        return self._secret is None or secrets.compare_digest(header.encode(), f"Bearer {self._secret}".encode())

    def _spool(self, version: int) -> Spool:
        spool = self._versions.get(version)
        if spool is None:
            held = ", ".join(map(str, sorted(self._versions))) or "none"
            raise PublishError(f"version {version} is not held any more (held: {held}); a newer one replaces it.")
        return spool

    def _meet(self, request: protocol.JoinGroupRequest, channel: _Channel) -> None:
        try:
            channel.group = join_group(
                channel.store, request.group, 0, request.world_size, self._backend, self._timeout_s, self._host
            )
        except RuntimeError as error:
            channel.problem = str(error)
            log.info("group %s was not joined: %s", request.group, error)
        channel.joined.set()


def _handler(sender: WeightSender) -> type[BaseHTTPRequestHandler]:
    calls: dict[str, tuple[type, Callable[[Any], Any]]] = {
        "/join": (protocol.JoinGroupRequest, sender.join),
        "/send": (protocol.SendBucketRequest, sender.send),
        "/leave": (protocol.LeaveGroupRequest, sender.leave),
    }

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(min(int(self.headers.get("Content-Length", 0)), _BODY_BYTES))
            if not sender.authorized(self.headers.get("Authorization", "")):
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


def _problem(error: Exception) -> protocol.ErrorReply:
    return protocol.ErrorReply(type(error).__name__, str(error))
