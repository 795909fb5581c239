"""One tensor that torch.save wrote into the middle of a larger file, without a copy: its memory is the file's."""

import mmap
import sys
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.utils import _create_file_view

_BYTE_ORDER = "byteorder"
_DATA = "data/0"
"""The only storage of an archive that holds one tensor."""


def map_stored(file: Path, offset: int, length: int) -> Tensor:
    """The tensor in ``length`` bytes of ``file``; what is written into it does not reach the file.

    Raises:
        Exception: of many kinds, if the bytes are damaged or hold something else.
    """
    with file.open("rb") as stream:
        part = cast(BinaryIO, _create_file_view(stream, offset, length))
        archive: Any = torch._C.PyTorchFileReader(part)  # type: ignore[arg-type]
        if archive.has_record(_BYTE_ORDER) and archive.get_record(_BYTE_ORDER) != sys.byteorder.encode():
            raise ValueError("numbers in another byte order than this machine's")
        part.seek(0)
        described: Tensor = torch.load(part, map_location="meta", weights_only=True)
        start, size = archive.get_record_offset(_DATA), described.untyped_storage().nbytes()
        if start + size > length:
            raise ValueError(f"{size} bytes of data from {start} of {length}")
        return _map(stream, offset + start, described)


def _map(stream: BinaryIO, start: int, described: Tensor) -> Tensor:
    page = start - start % mmap.ALLOCATIONGRANULARITY
    size = described.untyped_storage().nbytes()
    memory = mmap.mmap(stream.fileno(), start - page + size, access=mmap.ACCESS_COPY, offset=page)
    flat = torch.frombuffer(memory, dtype=described.dtype, count=size // described.itemsize, offset=start - page)
    return flat.as_strided(described.shape, described.stride(), described.storage_offset())
