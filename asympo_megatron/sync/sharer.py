"""The trainer's end of the colocated transport: buckets in shared memory, one engine and one bucket at a time.

    trainer            store(version, tensors) ── gather, tensor by tensor, into a spool; the learner goes on
    controller (HTTP)  /open a channel ─► /share each bucket ─► /leave          engine maps it beside it

A channel has shared memory for one bucket, which is used again: nothing is left behind by an engine that dies.
"""

import threading
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from asympo_megatron import protocol
from asympo_megatron.errors import PublishError
from asympo_megatron.sync.bucket import bucket_bytes
from asympo_megatron.sync.commands import CommandServer
from asympo_megatron.sync.handles import SharedBuffer
from asympo_megatron.sync.spool import Spool, Versions

_HOST = "127.0.0.1"


@dataclass(frozen=True)
class _Channel:
    version: int
    spool: Spool
    buffer: SharedBuffer


class WeightSharer:
    """Keeps published versions in spools and puts their buckets where engines of this machine can map them.

    Args:
        token: bearer token that the controller must show; None: everybody on this machine may call.
        bucket_bytes: largest bucket, except where one tensor alone is larger.
        folder: where spools lie; None takes the system's temporary directory.
    """

    def __init__(self, token: str | None, bucket_bytes: int, folder: str | Path | None = None) -> None:
        self._versions = Versions(bucket_bytes, folder)
        self._channels: dict[str, _Channel] = {}
        self._unused: list[SharedBuffer] = []
        self._lock = threading.Lock()
        self._server = CommandServer(
            _HOST,
            token,
            {
                "/open": (protocol.OpenChannelRequest, self.open),
                "/share": (protocol.ShareBucketRequest, self.share),
                "/leave": (protocol.LeaveGroupRequest, self.leave),
            },
        )

    @property
    def address(self) -> str:
        """``colocated://HOST:PORT``, which a published version names in place of a directory."""
        return f"{protocol.COLOCATED}{_HOST}:{self._server.port}"

    def store(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take a version in, one tensor in hand at a time.

        Raises:
            PublishError: the version cannot be spooled, or one of its buckets does not fit into shared memory.
        """
        size = _largest(self._versions.store(version, tensors))
        with self._lock:  # the first engine's memory: without it the run ends here, with the reason
            if not self._unused and not self._channels:
                self._unused.append(SharedBuffer(size))

    def keep(self, versions: Collection[int]) -> None:
        """Forget all other versions, and end their channels: whoever opened one is gone, or has given it up."""
        self._versions.keep(versions)
        for name in [name for name, channel in list(self._channels.items()) if channel.version not in versions]:
            self.leave(protocol.LeaveGroupRequest(name))

    def close(self) -> None:
        """Stop answering."""
        self._server.close()
        self._channels.clear()
        self._unused.clear()

    def open(self, request: protocol.OpenChannelRequest) -> protocol.OpenChannelReply:
        """Get memory for a transfer."""
        spool = self._versions.spool(request.version)
        size = _largest(spool)
        with self._lock:
            fitting = [buffer for buffer in self._unused if buffer.size >= size]
            self._unused = fitting[1:]  # what has become too small for a bucket is given up
        buffer = fitting[0] if fitting else SharedBuffer(size)
        self._channels[request.channel] = _Channel(request.version, spool, buffer)
        return protocol.OpenChannelReply(len(spool.buckets))

    def share(self, request: protocol.ShareBucketRequest) -> protocol.ShareBucketReply:
        """Put a bucket into the channel's memory, over the one before it, which the engine has answered for."""
        channel = self._channels.get(request.channel)
        if channel is None:
            raise PublishError(f"channel {request.channel} is not open.")
        info, data = channel.spool.buckets[request.bucket], channel.spool.bucket(request.bucket)
        channel.buffer.fill(data)
        return protocol.ShareBucketReply([channel.buffer.message(info) for _ in range(request.ranks)])

    def leave(self, request: protocol.LeaveGroupRequest) -> None:
        """The transfer is over, or has failed; an unknown one is no error."""
        channel = self._channels.pop(request.group, None)
        if channel is not None:
            with self._lock:
                self._unused.append(channel.buffer)


def _largest(spool: Spool) -> int:
    return max(1, *(bucket_bytes(info) for info in spool.buckets))
