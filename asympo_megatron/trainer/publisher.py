"""Weights on their way to the engines: version number, files, announcement, clean-up."""

from collections import deque
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from asympo_megatron import protocol
from asympo_megatron.config import Config
from asympo_megatron.conversion import export_hf
from asympo_megatron.mcore import Learner
from asympo_megatron.sync import prune_versions, write_version
from asympo_megatron.trainer.client import ControllerClient
from asympo_megatron.trainer.exchange import Exchange


class Publisher:
    """Writes the learner's weights as a new version and tells the controller, which drives the engines.

    Args:
        weights_dir: RUN_DIR/weights, readable by every engine (a shared file system on a cluster).
        model_dir: config.json and tokenizer that go into every version.
    """

    def __init__(
        self, config: Config, client: ControllerClient, exchange: Exchange, weights_dir: Path, model_dir: Path
    ) -> None:
        self._config, self._client, self._exchange = config, client, exchange
        self._weights_dir, self._model_dir = weights_dir, model_dir

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
        self._exchange.from_rank0(lambda: self._write(version.version, step, tensors, incarnation, checksum), None)

    def _write(
        self, version: int, step: int, tensors: Iterator[tuple[str, Tensor]], incarnation: int, checksum: str
    ) -> None:
        try:
            path = write_version(
                self._weights_dir, version, step=step, tensors=tensors, checksum=checksum, model_files=self._model_dir
            )
        finally:
            deque(tensors, maxlen=0)  # the other ranks walk to the end, even when the disk is full here
        request = protocol.PublishRequest(incarnation, step, version, checksum, str(path.resolve()))
        reply = self._client.publish(request)
        prune_versions(self._weights_dir, self._config.sync.keep_last, reply.in_use)
