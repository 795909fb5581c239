"""Where the trainer puts a version so that engines can get it."""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Protocol

from torch import Tensor

from asympo_megatron.errors import PublishError
from asympo_megatron.sync.delta import copy_version, write_delta
from asympo_megatron.sync.disk import write_version
from asympo_megatron.sync.manifest import prune_versions
from asympo_megatron.sync.own_folder import OwnFolder


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


class DeltaTransport:
    """The same, but for most versions only what changed since the one before.

    Each version is first written to a local directory, where it is compared with the one before it, tensor by tensor.
    That directory ends with this process: whoever resumes publishes a whole version first.

    Args:
        root, model_files, keep_last: see :class:`DiskTransport`; what kept versions are made from stays, too.
        deltas: at most so many after a whole version.
        folder: where the last version lies, and the next one.
    """

    def __init__(self, root: Path, model_files: Path, keep_last: int, deltas: int, folder: OwnFolder) -> None:
        self._root, self._model_files, self._keep_last = root, model_files, keep_last
        self._deltas, self._folder = deltas, folder
        self._base: Path | None = None
        self._since_whole = 0

    def store(self, version: int, step: int, tensors: Iterable[tuple[str, Tensor]], checksum: str) -> str:
        try:
            new = write_version(self._folder.path, version, step, tensors, checksum, self._model_files)
        except PublishError as error:
            raise PublishError(f"sync.deltas compares versions in sync.spool_dir: {error}") from error
        if self._base is None or self._since_whole == self._deltas:
            path, self._since_whole = copy_version(self._root, new), 0
        else:
            path, self._since_whole = write_delta(self._root, self._base, new), self._since_whole + 1
        self._base = new
        prune_versions(self._folder.path, 1)
        return str(path.resolve())

    def keep(self, in_use: Collection[int]) -> None:
        prune_versions(self._root, self._keep_last, in_use)

    def close(self) -> None:
        """Published versions stay."""
        self._folder.close()


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
