"""The trainer's end of the collective transport: weights in buckets, handed to one engine at a time on command.

    trainer            store(version, tensors) ── gather, tensor by tensor, into a spool; the learner goes on
    controller (HTTP)  /join a group ─► /send each bucket ─► /leave             engine receives beside it

Every engine has a process group and a thread of its own here: a dead one times out alone.
"""

import logging
import threading
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from asympo_megatron import protocol
from asympo_megatron.errors import PublishError
from asympo_megatron.sync.commands import CommandServer
from asympo_megatron.sync.group import WeightGroup, join_group, open_store
from asympo_megatron.sync.spool import Spool, Versions

log = logging.getLogger(__name__)


@dataclass
class _Channel:
    """One engine's group; joined by a thread, because both sides must come at the same time."""

    version: int
    spool: Spool
    store: dist.TCPStore
    joined: threading.Event = field(default_factory=threading.Event)
    group: WeightGroup | None = None
    problem: str = ""

    def end(self) -> None:
        """Give the group up, whatever it is doing."""
        group, self.group = self.group, None
        if group is not None:
            group.abort()


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
        self._host, self._backend, self._timeout_s = host, backend, timeout_s
        self._versions = Versions(bucket_bytes, folder)
        self._channels: dict[str, _Channel] = {}
        self._server = CommandServer(
            host,
            token,
            {
                "/join": (protocol.JoinGroupRequest, self.join),
                "/send": (protocol.SendBucketRequest, self.send),
                "/leave": (protocol.LeaveGroupRequest, self.leave),
            },
        )

    @property
    def address(self) -> str:
        """``collective://HOST:PORT``, which a published version names in place of a directory."""
        return f"{protocol.COLLECTIVE}{self._host}:{self._server.port}"

    def store(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take a version in, one tensor in hand at a time.

        Raises:
            PublishError: see :func:`~asympo_megatron.sync.spool.spool_version`.
        """
        self._versions.store(version, tensors)

    def keep(self, versions: Collection[int]) -> None:
        """Forget all other versions, and end their groups: whoever opened one is gone, or has given it up."""
        self._versions.keep(versions)
        for name in [name for name, channel in list(self._channels.items()) if channel.version not in versions]:
            self.leave(protocol.LeaveGroupRequest(name))

    def close(self) -> None:
        """Stop answering; groups end."""
        self._server.close()
        for name in list(self._channels):
            self.leave(protocol.LeaveGroupRequest(name))

    def join(self, request: protocol.JoinGroupRequest) -> protocol.JoinGroupReply:
        """Open a group of which this process is rank 0. Answers at once; the engine may come now."""
        spool = self._versions.spool(request.version)
        channel = _Channel(request.version, spool, open_store(self._host, self._timeout_s))
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
        if channel is not None:  # gloo takes its time to end a group; the engine shall not wait for that
            threading.Thread(target=channel.end, name=f"end {request.group}", daemon=True).start()

    def _meet(self, request: protocol.JoinGroupRequest, channel: _Channel) -> None:
        try:
            channel.group = join_group(
                channel.store, request.group, 0, request.world_size, self._backend, self._timeout_s, self._host
            )
        except RuntimeError as error:
            channel.problem = str(error)
            log.info("group %s was not joined: %s", request.group, error)
        channel.joined.set()
