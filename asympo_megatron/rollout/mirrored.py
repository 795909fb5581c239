"""Weights published as changes into an engine: its host's mirror makes them whole, the engine loads local files.

    bring (mirror) ─► pause ─► /update_weights_from_disk ─► verify ─► continue ─► release (mirror)

The engine serves while the mirror works.
"""

import logging
import secrets
from dataclasses import dataclass
from urllib.parse import urlsplit

from asympo_megatron import protocol
from asympo_megatron.errors import EngineError, PublishError
from asympo_megatron.rollout.client import EngineClient
from asympo_megatron.rollout.collective import SenderClient, SenderLost, SenderRefused
from asympo_megatron.rollout.rows import VersionRow

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Mirrored:
    """How the mirrors of the engines' hosts are reached.

    Args:
        run_prefix: begins the names of this run's transfers.
        token: bearer token of the mirrors.
        port: of each host's mirror.
        timeout_s: deadline of making a version whole, and of loading it.
    """

    run_prefix: str
    token: str | None
    port: int
    timeout_s: float

    async def open(self, client: EngineClient, row: VersionRow) -> "MirrorTransfer":
        """Have the version whole on the engine's host.

        Raises:
            EngineError: its mirror is not there, or could not make the version.
        """
        host = urlsplit(client.url).hostname or ""
        address = f"mirror://{f'[{host}]' if ':' in host else host}:{self.port}"
        mirror = SenderClient(address, self.token, self.timeout_s)
        name = f"{self.run_prefix}{row.version}.{secrets.token_hex(4)}"
        try:
            request = protocol.BringVersionRequest(name, row.version)
            brought = await mirror.call("/bring", request, protocol.BringVersionReply)
        except SenderRefused as error:
            raise EngineError(f"engine {client.url} was given no weights: {error}") from error
        except SenderLost as error:
            raise EngineError(
                f"engine {client.url} has no mirror at {host}:{self.port}, which makes published changes whole "
                f"(sync.deltas): {error}. Run `asympo mirror` there."
            ) from error
        releasing = SenderClient(address, self.token, client.control_timeout_s)
        return MirrorTransfer(client, releasing, name, brought.path, self.timeout_s)


@dataclass(frozen=True)
class MirrorTransfer:
    """A whole version on the engine's host, kept until it is loaded."""

    client: EngineClient
    mirror: SenderClient
    name: str
    path: str
    timeout_s: float

    async def run(self, label: str, *, flush_cache: bool) -> None:
        """Load it; raises EngineError when the engine refused, or did not answer in time."""
        await self.client.update_weights(self.path, label, flush_cache=flush_cache, timeout_s=self.timeout_s)

    async def close(self) -> None:
        """Let it go; a mirror that cannot be reached has let it go already, or will after a while."""
        try:
            await self.mirror.call("/release", protocol.LeaveGroupRequest(self.name), dict)
        except PublishError as error:
            log.debug("transfer %s: %s", self.name, error)
