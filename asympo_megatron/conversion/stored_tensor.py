"""One tensor that torch.save wrote into the middle of a larger file, without a copy: its memory is the file's."""

import mmap
import sys
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.utils import _create_file_view

from asympo_megatron.conversion.plain_pickle import StoredTensor, load_tensor_description

_BYTE_ORDER = "byteorder"


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
        described = load_tensor_description(archive.get_record("data.pkl"))
        start = archive.get_record_offset(f"data/{described.storage}")
        if start + described.nbytes > length:
            raise ValueError(f"{described.nbytes} bytes of data from {start} of {length}")
        return _map(stream, offset + start, described)


def _map(stream: BinaryIO, start: int, described: StoredTensor) -> Tensor:
    page = start - start % mmap.ALLOCATIONGRANULARITY
    memory = mmap.mmap(stream.fileno(), start - page + described.nbytes, access=mmap.ACCESS_COPY, offset=page)
    flat = torch.frombuffer(memory, dtype=described.dtype, count=described.elements, offset=start - page)
    return flat.as_strided(described.shape, described.strides, described.offset)
