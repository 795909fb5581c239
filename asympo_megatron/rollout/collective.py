"""Weights from the trainer's memory into one engine: a process group for the two, a session, bucket by bucket.

    join (sender, engine) ─► pause ─► begin ─► [update (engine) + send (sender)] per bucket ─► end ─► verify ─► continue

Whoever refuses or is silent ends this engine's transfer alone; every engine has its own group.
"""

import asyncio
import logging
import secrets
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp
import msgspec

from asympo_megatron import protocol
from asympo_megatron.errors import EngineError, PublishError
from asympo_megatron.rollout.client import EngineClient
from asympo_megatron.rollout.rows import VersionRow

log = logging.getLogger(__name__)
GRACE_S = 1.0
"""The sender's own deadline comes first: what it says explains more than silence."""
Reply = TypeVar("Reply")


class SenderLost(PublishError):
    """The trainer's sender is gone, or does not hold the version: no fault of the engine."""


class SenderRefused(SenderLost):
    """The sender is there and says no."""


class SenderClient:
    """Calls to the trainer's sender.

    Args:
        address: ``collective://HOST:PORT`` or ``colocated://HOST:PORT``.
        token: its bearer token, or None.
        timeout_s: deadline of a call.
    """

    def __init__(self, address: str, token: str | None, timeout_s: float) -> None:
        self._url = "http://" + address.partition("://")[2]
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._timeout_s = timeout_s

    async def join(self, request: protocol.JoinGroupRequest) -> protocol.JoinGroupReply:
        return await self.call("/join", request, protocol.JoinGroupReply)

    async def send(self, request: protocol.SendBucketRequest) -> None:
        await self.call("/send", request, dict)

    async def leave(self, request: protocol.LeaveGroupRequest) -> None:
        await self.call("/leave", request, dict)

    async def call(self, path: str, request: object, kind: type[Reply]) -> Reply:
        """One command; raises SenderLost or SenderRefused."""
        timeout = aiohttp.ClientTimeout(total=self._timeout_s)
        try:
            async with (
                aiohttp.ClientSession(headers=self._headers, timeout=timeout) as session,
                session.post(self._url + path, data=msgspec.msgpack.encode(request)) as answer,
            ):
                status, body = answer.status, await answer.read()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise SenderLost(f"the trainer's sender at {self._url} did not answer {path}: {error!r}") from error
        if status != 200:
            raise SenderRefused(f"the trainer's sender refused {path}: {_message(body)}")
        return msgspec.msgpack.decode(body, type=kind)


@dataclass(frozen=True)
class Collective:
    """How engines are reached from the trainer's memory.

    Args:
        run_prefix: begins the names of this run's groups.
        token: bearer token of the sender.
        timeout_s: deadline of one step of a transfer: a join, one bucket, one call.
    """

    run_prefix: str
    token: str | None
    timeout_s: float

    async def open(self, client: EngineClient, row: VersionRow) -> "Transfer":
        """Join sender and engine, while the engine still serves.

        Raises:
            SenderLost: the trainer has gone, or has a newer version.
            EngineError: the engine refused or was silent.
        """
        sender = SenderClient(row.path, self.token, self.timeout_s + GRACE_S)
        ranks = await client.tensor_parallel_size()
        name = f"{self.run_prefix}{row.version}.{secrets.token_hex(4)}"
        joined = await sender.join(protocol.JoinGroupRequest(name, 1 + ranks, row.version))
        body = {
            "master_address": joined.host,
            "master_port": joined.port,
            "rank_offset": 1,
            "world_size": 1 + ranks,
            "group_name": name,
            "backend": joined.backend,
        }
        transfer = Transfer(client, sender, name, joined.buckets, self.timeout_s)
        try:
            await client.update_call("/init_weights_update_group", body, self.timeout_s)
        except BaseException:
            await transfer.close()
            raise
        return transfer


@dataclass(frozen=True)
class Transfer:
    """A joined group of sender and engine."""

    client: EngineClient
    sender: SenderClient
    name: str
    buckets: list[protocol.BucketInfo]
    timeout_s: float

    async def run(self, label: str, *, flush_cache: bool) -> None:
        """Send every bucket inside a session; the label changes with the last one.

        Raises:
            SenderLost: the trainer could not send.
            EngineError: the engine refused, or did not receive in time.
        """
        session = await self.client.begin_update(self.timeout_s)
        for number, info in enumerate(self.buckets):
            last = number == len(self.buckets) - 1
            body = {"names": info.names, "dtypes": info.dtypes, "shapes": info.shapes, "group_name": self.name}
            body |= {"load_format": "flattened_bucket", "flush_cache": flush_cache and last}
            await self._bucket(number, body | ({"weight_version": label} if last else {}))
        if session:
            await self.client.update_call("/end_weight_update", {}, self.timeout_s)

    async def close(self) -> None:
        """End the group on both sides; what cannot be reached has ended it already."""
        sides = (self.sender.leave(protocol.LeaveGroupRequest(self.name)), self.client.destroy_group(self.name))
        for ended in await asyncio.gather(*sides, return_exceptions=True):
            if isinstance(ended, EngineError | PublishError):
                log.debug("group %s: %s", self.name, ended)
            elif isinstance(ended, BaseException):
                raise ended

    async def _bucket(self, number: int, body: dict[str, Any]) -> None:
        """The engine's answer decides: one that refuses must not leave the sender waiting for it, nor the other way."""
        receive = asyncio.create_task(
            self.client.update_call("/update_weights_from_distributed", body, self.timeout_s + 2 * GRACE_S)
        )
        send = asyncio.create_task(self.sender.send(protocol.SendBucketRequest(self.name, number)))
        try:
            done, _ = await asyncio.wait((receive, send), return_when=asyncio.FIRST_EXCEPTION)
            for task in (receive, send):  # the engine's own words first
                if task in done:
                    task.result()
        except SenderRefused as error:  # it is there and could not get rid of the bytes
            raise EngineError(f"engine {self.client.url} did not receive weights: {error}") from error
        finally:
            for task in (receive, send):
                task.cancel()
            await asyncio.gather(receive, send, return_exceptions=True)


def _message(body: bytes) -> str:
    try:
        return msgspec.msgpack.decode(body, type=protocol.ErrorReply).message
    except msgspec.DecodeError:
        return repr(body[:200])
