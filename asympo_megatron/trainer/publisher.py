"""Weights on their way to the engines: version number, transport, announcement, clean-up."""

from collections import deque
from collections.abc import Iterator

import msgspec
from torch import Tensor

from asympo_megatron import protocol
from asympo_megatron.config import Config
from asympo_megatron.conversion import export_hf
from asympo_megatron.mcore import Learner
from asympo_megatron.sync.transport import Transport
from asympo_megatron.trainer.client import ControllerClient
from asympo_megatron.trainer.exchange import Exchange
from asympo_megatron.trainer.handover import Handover


class Publisher:
    """Gives the learner's weights a version and tells the controller, which drives the engines.

    The learner waits until the last gathered tensor is taken; a thread does the rest and announces the version. One
    version at a time: the next begins when the one before is announced.

    Args:
        client: of this publisher alone, because its thread calls, too.
        transport: where rank 0 puts a version; None on the other ranks.
    """

    def __init__(
        self, config: Config, client: ControllerClient, exchange: Exchange, transport: Transport | None
    ) -> None:
        self._config, self._client, self._exchange = config, client, exchange
        self._transport = transport
        self._handover: Handover | None = None

    def due(self, step: int) -> bool:
        """Whether weights ``step`` are to be published: every interval, and the last ones."""
        return step % self._config.sync.interval_steps == 0 or step == self._config.run.steps

    def publish(self, learner: Learner, incarnation: int, checksum: str) -> None:
        """Collective. Publish the current weights unless the engines already hold them; returns when they are taken.

        Raises:
            PublishError, ControllerError: of this version, or of the one before.
        """
        self.settle(wait=True)
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
        described = protocol.PublishRequest(incarnation, step, version.version, checksum, "")
        self._exchange.from_rank0(lambda: self._begin(described, tensors), None)

    def settle(self, *, wait: bool) -> None:
        """Collective. Look what became of the last version, or wait until it is announced.

        Raises:
            PublishError, ControllerError: it was not; on every rank.
        """
        self._exchange.from_rank0(lambda: self._finish(wait=wait), None)

    def close(self) -> None:
        """No version is needed any more. What is on its way arrives, or fails unheard."""
        if self._handover is not None:
            self._handover.join()
        if self._transport is not None:
            self._transport.close()

    def _begin(self, described: protocol.PublishRequest, tensors: Iterator[tuple[str, Tensor]]) -> None:
        self._handover = Handover(lambda taken: self._hand_over(described, taken))
        try:
            self._handover.give(tensors)
        finally:
            deque(tensors, maxlen=0)  # the other ranks walk to the end, even when the disk is full here
        self._finish(wait=False)

    def _finish(self, *, wait: bool) -> None:
        if self._handover is not None and self._handover.finish(wait=wait):
            self._handover = None

    def _hand_over(self, described: protocol.PublishRequest, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """In the thread."""
        assert self._transport is not None  # rank 0 has one
        path = self._transport.store(described.version, described.step, tensors, described.checksum)
        reply = self._client.publish(msgspec.structs.replace(described, path=path))
        self._transport.keep(reply.in_use)
