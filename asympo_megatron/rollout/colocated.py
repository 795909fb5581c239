"""Weights from the trainer's memory into an engine of the same machine: by name of the memory, bucket by bucket.

    open (sharer) ─► pause ─► begin ─► [share (sharer), then update (engine)] per bucket ─► end ─► verify ─► continue

What the engine unpickles comes from this run's trainer and goes to loopback addresses only.
"""

import logging
import secrets
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from asympo_megatron import protocol
from asympo_megatron.config.limits import is_loopback
from asympo_megatron.errors import ControllerError, EngineError, PublishError
from asympo_megatron.rollout.client import EngineClient
from asympo_megatron.rollout.collective import GRACE_S, SenderClient, SenderRefused
from asympo_megatron.rollout.rows import VersionRow

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Colocated:
    """How engines of the trainer's machine are reached.

    Args:
        run_prefix: begins the names of this run's transfers.
        token: bearer token of the sharer.
        timeout_s: deadline of one step of a transfer: one bucket, one call.
    """

    run_prefix: str
    token: str | None
    timeout_s: float

    async def open(self, client: EngineClient, row: VersionRow) -> "SharedTransfer":
        """Get memory for a transfer, while the engine still serves.

        Raises:
            SenderLost: the trainer has gone, or has a newer version.
            EngineError: the engine was silent.
        """
        check_local(client.url)
        sharer = SenderClient(row.path, self.token, self.timeout_s + GRACE_S)
        ranks = await client.tensor_parallel_size()
        name = f"{self.run_prefix}{row.version}.{secrets.token_hex(4)}"
        opened = await sharer.call("/open", protocol.OpenChannelRequest(name, row.version), protocol.OpenChannelReply)
        return SharedTransfer(client, sharer, name, opened.buckets, ranks, self.timeout_s)


@dataclass(frozen=True)
class SharedTransfer:
    """Memory of the trainer, given to one engine."""

    client: EngineClient
    sharer: SenderClient
    name: str
    buckets: int
    ranks: int
    timeout_s: float

    async def run(self, label: str, *, flush_cache: bool) -> None:
        """Hand over every bucket inside a session; the label changes with the last one.

        Raises:
            SenderLost: the trainer could not share.
            EngineError: the engine refused, or did not answer in time.
        """
        session = await self.client.begin_update(self.timeout_s)
        for number in range(self.buckets):
            last = number == self.buckets - 1
            body: dict[str, Any] = {"serialized_named_tensors": await self._share(number)}
            body |= {"load_format": "flattened_bucket", "flush_cache": flush_cache and last}
            body |= {"weight_version": label} if last else {}
            await self.client.update_call("/update_weights_from_tensor", body, self.timeout_s)
        if session:
            await self.client.update_call("/end_weight_update", {}, self.timeout_s)

    async def close(self) -> None:
        """Give the memory back; a trainer that cannot be reached has ended it already."""
        try:
            await self.sharer.call("/leave", protocol.LeaveGroupRequest(self.name), dict)
        except PublishError as error:
            log.debug("transfer %s: %s", self.name, error)

    async def _share(self, number: int) -> list[str]:
        request = protocol.ShareBucketRequest(self.name, number, self.ranks)
        try:
            return (await self.sharer.call("/share", request, protocol.ShareBucketReply)).messages
        except SenderRefused as error:
            raise EngineError(f"engine {self.client.url} was given no weights: {error}") from error


def check_local(url: str) -> None:
    """Raises ControllerError unless the engine listens on this machine alone."""
    host = urlsplit(url).hostname or ""
    if not is_loopback(host):
        raise ControllerError(
            f"engine {url} is not on a loopback address: sync.transport=colocated gives engines memory of this machine "
            "and pickled messages. Start the engine here, or set sync.transport to disk or collective."
        )
