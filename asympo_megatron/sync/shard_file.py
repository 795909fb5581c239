"""One safetensors file, written tensor by tensor: the library's own writer wants all of them in memory, twice.

The header stands first and names what follows. A small file is held back until it is complete; a large one gets room
for its header, filled up with spaces, which the format allows.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from asympo_megatron.errors import PublishError

HELD_BYTES = 16 << 20
"""Data held back in the hope that the file ends and its header is known."""

HEADER_BYTES = 1 << 20
"""Room for the header of a larger file: about 8,000 tensors."""

DTYPES: Mapping[torch.dtype, str] = MappingProxyType(
    {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.int16: "I16",
        torch.int8: "I8",
        torch.uint8: "U8",
        torch.bool: "BOOL",
    }
)


class ShardFile:
    """A safetensors file under construction; whole once :meth:`close` has returned.

    Args:
        path: file to write.
        header_bytes: room for the header of a file that outgrows ``HELD_BYTES``.
    """

    def __init__(self, path: Path, header_bytes: int = HEADER_BYTES) -> None:
        self.path, self._room = path, header_bytes
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._header_size = len(_encoded(self._header))
        self._held: list[Tensor] = []
        self._file: BinaryIO | None = None
        self.data_bytes = 0
        self.names: list[str] = []

    def has_room_for(self, name: str, tensor: Tensor) -> bool:
        """Whether the header can still name this tensor."""
        return self._header_size + len(_encoded({name: self._entry(tensor)})) + 8 <= self._room

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a contiguous tensor on the CPU.

        Raises:
            PublishError: a dtype without a name in the format.
            OSError: the file cannot be written.
        """
        entry = self._entry(tensor)
        self._header[name] = entry
        self._header_size += len(_encoded({name: entry}))
        self.names.append(name)
        self.data_bytes += tensor.nbytes
        if self._file is not None:
            self._file.write(_bytes(tensor))
            return
        self._held.append(tensor)
        if self.data_bytes > HELD_BYTES:
            self._flush_held(self._room)

    def close(self) -> None:
        """Complete the file.

        Raises:
            OSError: the file cannot be written.
        """
        header = _encoded(self._header)
        if self._file is None:
            self._flush_held(len(header) + -len(header) % 8)
        assert self._file is not None
        self._file.seek(8)
        self._file.write(header)
        self.abandon()

    def abandon(self) -> None:
        """Close the file as it is."""
        self._held = []
        if self._file is not None:
            self._file.close()

    def _entry(self, tensor: Tensor) -> dict[str, Any]:
        if tensor.dtype not in DTYPES:
            known = ", ".join(str(dtype) for dtype in DTYPES)
            raise PublishError(f"{self.path.name}: tensors of {tensor.dtype} cannot be written; convert to {known}.")
        offsets = [self.data_bytes, self.data_bytes + tensor.nbytes]
        return {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}

    def _flush_held(self, room: int) -> None:
        self._file = self.path.open("wb")
        self._file.write(struct.pack("<Q", room) + b" " * room)
        for tensor in self._held:
            self._file.write(_bytes(tensor))
        self._held = []


def _encoded(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, separators=(",", ":")).encode()


def _bytes(tensor: Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
