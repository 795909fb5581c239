"""A version on its way to the engines: buckets in a file without a name, which ends with this process.

Weights in memory change with the next step, and engines load when they can. So a version is written once, as the
gather yields it, one tensor in hand, and each transfer maps the bucket that it sends: the trainer never holds a second
copy. What the kernel caches of the file it takes back when memory is needed.
"""

import mmap
import tempfile
import weakref
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from asympo_megatron.errors import AsympoError, PublishError
from asympo_megatron.protocol import BucketInfo
from asympo_megatron.sync.bucket import bucket_bytes


class Spool:
    """Buckets of one version; made by :func:`spool_version`. The file ends with the last reference.

    Args:
        file: holds the buckets; open for reading and writing.
        buckets: what is in them, in order.
        offsets: where they begin; multiples of the page size.
    """

    def __init__(self, file: BinaryIO, buckets: list[BucketInfo], offsets: list[int]) -> None:
        self._descriptor = file.fileno()
        self._close = weakref.finalize(self, file.close)
        self._offsets = offsets
        self.buckets = buckets

    def bucket(self, number: int) -> Tensor:
        """The bytes of a bucket, uint8 [bytes]: a map of the file that ends with the tensor. Only to be read."""
        size = bucket_bytes(self.buckets[number])
        if size == 0:
            return torch.empty(0, dtype=torch.uint8)
        # Shared and writable in name only: populating a private map would copy it, a read-only one makes torch warn.
        flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
        mapped = mmap.mmap(self._descriptor, size, flags=flags, offset=self._offsets[number])
        return torch.frombuffer(mapped, dtype=torch.uint8)


class Versions:
    """The spools of the published versions that engines still need.

    Args:
        largest_bytes: largest bucket, except where one tensor alone is larger.
        folder: where spools lie; None takes the system's temporary directory.
    """

    def __init__(self, largest_bytes: int, folder: str | Path | None) -> None:
        self._largest_bytes, self._folder = largest_bytes, folder
        self._spools: dict[int, Spool] = {}

    def store(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> Spool:
        """Take a version in; raises PublishError as :func:`spool_version` does."""
        self._spools[version] = spool_version(tensors, self._largest_bytes, self._folder)
        return self._spools[version]

    def keep(self, versions: Collection[int]) -> None:
        """Forget all others; a file ends with the last transfer that reads it."""
        for version in [known for known in self._spools if known not in versions]:
            del self._spools[version]

    def spool(self, version: int) -> Spool:
        """Raises PublishError when the version is not held any more."""
        spool = self._spools.get(version)
        if spool is None:
            held = ", ".join(map(str, sorted(self._spools))) or "none"
            raise PublishError(f"version {version} is not held any more (held: {held}); a newer one replaces it.")
        return spool


def spool_version(tensors: Iterable[tuple[str, Tensor]], largest_bytes: int, folder: str | Path | None = None) -> Spool:
    """Write tensors into buckets of at most ``largest_bytes``; a larger tensor has a bucket of its own.

    Tensors of one bucket have one dtype: the receiver refuses a tensor that does not begin at a multiple of its item
    size.

    Args:
        tensors: (name, tensor) pairs; read once, one in memory at a time.
        largest_bytes: size of a bucket.
        folder: where the file lies; None takes the system's temporary directory.

    Raises:
        PublishError: a name was given twice, no tensor at all, or the file cannot be written.
    """
    try:
        file: BinaryIO = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # lives as long as the spool
        try:
            buckets, offsets = _write(file, tensors, largest_bytes)
        except BaseException:
            file.close()
            raise
    except AsympoError:
        raise
    except OSError as error:
        raise PublishError(_unwritable(folder, error)) from error
    return Spool(file, buckets, offsets)


def _write(
    file: BinaryIO, tensors: Iterable[tuple[str, Tensor]], largest_bytes: int
) -> tuple[list[BucketInfo], list[int]]:
    buckets: list[BucketInfo] = []
    offsets: list[int] = []
    seen: set[str] = set()
    for name, tensor in tensors:
        if name in seen:
            raise PublishError(f"tensor {name} was given twice; each name of a version is sent once.")
        seen.add(name)
        dtype, end = str(tensor.dtype).removeprefix("torch."), file.tell()
        if not buckets or end - offsets[-1] + tensor.nbytes > largest_bytes or dtype != buckets[-1].dtypes[0]:
            offsets.append(file.seek(-(-end // mmap.PAGESIZE) * mmap.PAGESIZE))
            buckets.append(BucketInfo([], [], []))
        buckets[-1].names.append(name)
        buckets[-1].dtypes.append(dtype)
        buckets[-1].shapes.append(list(tensor.shape))
        file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        del tensor  # before the next one is gathered
    if not seen:
        raise PublishError("no tensor was given; a version without weights cannot be sent.")
    file.flush()
    return buckets, offsets


def _unwritable(folder: str | Path | None, error: OSError) -> str:
    return (
        f"a version could not be written to {folder or tempfile.gettempdir()} before it is sent: {error}. Set "
        "sync.spool_dir to a directory on a local disk with room for three versions, and resume."
    )
