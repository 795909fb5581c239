"""Weights on their way to the engines: version number, transport, announcement, clean-up."""

from collections import deque
from collections.abc import Iterator

from torch import Tensor

from asympo_megatron import protocol
from asympo_megatron.config import Config
from asympo_megatron.conversion import export_hf
from asympo_megatron.mcore import Learner
from asympo_megatron.sync.transport import Transport
from asympo_megatron.trainer.client import ControllerClient
from asympo_megatron.trainer.exchange import Exchange


class Publisher:
    """Gives the learner's weights a version and tells the controller, which drives the engines.

    Args:
        transport: where rank 0 puts a version; None on the other ranks.
    """

    def __init__(
        self, config: Config, client: ControllerClient, exchange: Exchange, transport: Transport | None
    ) -> None:
        self._config, self._client, self._exchange = config, client, exchange
        self._transport = transport

    def due(self, step: int) -> bool:
        """Whether weights ``step`` are to be published: every interval, and the last ones."""
        return step % self._config.sync.interval_steps == 0 or step == self._config.run.steps

    def publish(self, learner: Learner, incarnation: int, checksum: str) -> None:
        """Collective. Publish the current weights unless the engines already hold them."""
        step = learner.step_count
        version = self._exchange.from_rank0(
            lambda: self._client.version(protocol.VersionRequest(incarnation, step, checksum)), protocol.VersionReply
        )
        if not version.needed:
            return
        tensors = export_hf(learner)  # collective: every rank walks through it, rank 0 keeps what it yields
        if self._exchange.rank != 0:
            for _ in tensors:
                pass
        self._exchange.from_rank0(lambda: self._hand_over(version.version, step, tensors, incarnation, checksum), None)

    def close(self) -> None:
        """No version is needed any more."""
        if self._transport is not None:
            self._transport.close()

    def _hand_over(
        self, version: int, step: int, tensors: Iterator[tuple[str, Tensor]], incarnation: int, checksum: str
    ) -> None:
        assert self._transport is not None  # rank 0 has one
        try:
            path = self._transport.store(version, step, tensors, checksum)
        finally:
            deque(tensors, maxlen=0)  # the other ranks walk to the end, even when the disk is full here
        reply = self._client.publish(protocol.PublishRequest(incarnation, step, version, checksum, path))
        self._transport.keep(reply.in_use)
