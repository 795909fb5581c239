"""Where the trainer puts a version so that engines can get it."""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Protocol

from torch import Tensor

from asympo_megatron.sync.disk import write_version
from asympo_megatron.sync.manifest import prune_versions


class Transport(Protocol):
    """What rank 0 does with the tensors of a version."""

    def store(self, version: int, step: int, tensors: Iterable[tuple[str, Tensor]], checksum: str) -> str:
        """Take a version in; returns the path by which the controller finds it."""

    def keep(self, in_use: Collection[int]) -> None:
        """Drop old versions, but none in ``in_use``."""

    def close(self) -> None:
        """No version is needed any more."""


class DiskTransport:
    """Safetensors under ``root``, which every engine can read.

    Args:
        root: directory of all versions.
        model_files: directory with config.json and tokenizer.
        keep_last: versions that stay, beside those in use.
    """

    def __init__(self, root: Path, model_files: Path, keep_last: int) -> None:
        self._root, self._model_files, self._keep_last = root, model_files, keep_last

    def store(self, version: int, step: int, tensors: Iterable[tuple[str, Tensor]], checksum: str) -> str:
        path = write_version(self._root, version, step, tensors, checksum, self._model_files)
        return str(path.resolve())

    def keep(self, in_use: Collection[int]) -> None:
        prune_versions(self._root, self._keep_last, in_use)

    def close(self) -> None:
        """Versions stay on disk."""


class Sender(Protocol):
    """Hands versions to engines from this process."""

    @property
    def address(self) -> str: ...
    def store(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> None: ...
    def keep(self, versions: Collection[int]) -> None: ...
    def close(self) -> None: ...


class SenderTransport:
    """Buckets beside this process, handed to each engine on the controller's command.

    Args:
        sender: broadcasts them (WeightSender), or shares memory (WeightSharer).
    """

    def __init__(self, sender: Sender) -> None:
        self._sender = sender

    def store(self, version: int, step: int, tensors: Iterable[tuple[str, Tensor]], checksum: str) -> str:
        self._sender.store(version, tensors)
        return self._sender.address

    def keep(self, in_use: Collection[int]) -> None:
        self._sender.keep(in_use)

    def close(self) -> None:
        self._sender.close()
