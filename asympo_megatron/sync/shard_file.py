"""One safetensors file, written tensor by tensor: the library's own writer wants all of them in memory, twice.

The header stands first and names what follows. Where that is known from the start, the file is hashed while it is
written. Else a small file is held back until it is complete; a large one gets room for its header, filled up with
spaces, which the format allows.
"""

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from asympo_megatron.errors import PublishError
from asympo_megatron.files import Flusher

HELD_BYTES = 16 << 20
"""Data held back in the hope that the file ends and its header is known."""

HEADER_BYTES = 1 << 20
"""Room for the header of a larger file: about 8,000 tensors."""

_SMALL_BYTES = 1 << 16
"""Less is written before it is hashed: another thread would cost more than it saves."""

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


@dataclass(frozen=True)
class Announced:
    """Tensors of which names, shapes and dtypes are known before the first of them is there.

    Args:
        described: (name, tensor on the meta device), in the order of ``tensors``.
        tensors: (name, tensor) pairs, read once.
    """

    described: Sequence[tuple[str, Tensor]]
    tensors: Iterable[tuple[str, Tensor]]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.tensors)


class Header:
    """The header of a safetensors file under construction."""

    def __init__(self) -> None:
        self._entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self.bytes = len(_encoded(self._entries))
        self.data_bytes = 0
        self.names: list[str] = []

    def bytes_with(self, name: str, tensor: Tensor) -> int:
        """Size with one more tensor, at most."""
        return self.bytes + len(_encoded({name: self._entry(tensor)}))

    def fits(self, tensor: Tensor, shard_bytes: int) -> bool:
        """Whether the data stays within ``shard_bytes``; a tensor that is larger has a file of its own."""
        return not self.names or self.data_bytes + tensor.nbytes <= shard_bytes

    def add(self, name: str, tensor: Tensor) -> None:
        """Name the next tensor; its data is not looked at.

        Raises:
            PublishError: a dtype without a name in the format.
        """
        self.bytes, self._entries[name] = self.bytes_with(name, tensor), self._entry(tensor)
        self.names.append(name)
        self.data_bytes += tensor.nbytes

    def encoded(self) -> bytes:
        """As the file has it, filled up to whole words."""
        header = _encoded(self._entries)
        return header + b" " * (-len(header) % 8)

    def _entry(self, tensor: Tensor) -> dict[str, Any]:
        if tensor.dtype not in DTYPES:
            known = ", ".join(str(dtype) for dtype in DTYPES)
            raise PublishError(f"tensors of {tensor.dtype} cannot be written; convert to {known}.")
        offsets = [self.data_bytes, self.data_bytes + tensor.nbytes]
        return {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}


def cut(described: Iterable[tuple[str, Tensor]], shard_bytes: int) -> list[Header]:
    """The headers of the files that announced tensors fill."""
    headers = [Header()]
    for name, tensor in described:
        if not headers[-1].fits(tensor, shard_bytes):
            headers.append(Header())
        headers[-1].add(name, tensor)
    return headers


class AnnouncedShardFile:
    """A safetensors file with a known header, hashed while it is written; on leaving, it is on the disk.

    Args:
        path: file to write.
        header: of all tensors to come.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self._path, self._announced, self._written = path, header.encoded(), Header()
        self._sha256, self._threads = hashlib.sha256(), ThreadPoolExecutor(1, "shard")

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a contiguous tensor on the CPU.

        Raises:
            OSError: the file cannot be written.
        """
        if not self._written.names:
            self._put(struct.pack("<Q", len(self._announced)) + self._announced)
        self._written.add(name, tensor)
        self._put(_bytes(tensor))

    def digest(self) -> str:
        """Hexadecimal sha256 of the file.

        Raises:
            PublishError: the tensors are not those of the header.
        """
        if self._written.encoded() != self._announced:
            raise PublishError(f"{self._path.name}: the tensors differ from those announced in name, shape or dtype.")
        return self._sha256.hexdigest()

    def __enter__(self) -> "AnnouncedShardFile":
        self._file = self._path.open("wb")
        self._flusher = Flusher(self._file).__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._threads.shutdown()
        with self._file:
            self._flusher.__exit__(*error)

    def _put(self, data: Any) -> None:
        if len(data) < _SMALL_BYTES:
            written = self._file.write(data)
            self._sha256.update(data)
        else:
            writing = self._threads.submit(self._file.write, data)
            self._sha256.update(data)
            written = writing.result()
        self._flusher.wrote(written)


class ShardFile:
    """A safetensors file under construction; whole once :meth:`close` has returned.

    Args:
        path: file to write.
        header_bytes: room for the header of a file that outgrows ``HELD_BYTES``.
    """

    def __init__(self, path: Path, header_bytes: int = HEADER_BYTES) -> None:
        self.path, self._room = path, header_bytes
        self.header = Header()
        self._held: list[bytes] = []
        self._file: BinaryIO | None = None

    def fits(self, name: str, tensor: Tensor, shard_bytes: int) -> bool:
        """Whether this tensor belongs into this file, too."""
        has_room = self.header.bytes_with(name, tensor) + 8 <= self._room
        return not self.header.names or (self.header.fits(tensor, shard_bytes) and has_room)

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a contiguous tensor on the CPU.

        Raises:
            PublishError: a dtype without a name in the format.
            OSError: the file cannot be written.
        """
        self.header.add(name, tensor)
        if self._file is None and self.header.data_bytes > HELD_BYTES:
            self._flush_held(self._room)
        if self._file is None:
            self._held.append(bytes(_bytes(tensor)))  # a copy: the tensor may change before the file is written
        else:
            self._file.write(_bytes(tensor))

    def close(self) -> None:
        """Complete the file.

        Raises:
            OSError: the file cannot be written.
        """
        header = self.header.encoded()
        if self._file is None:
            self._flush_held(len(header))
        assert self._file is not None
        self._file.seek(8)
        self._file.write(header)
        self.abandon()

    def abandon(self) -> None:
        """Close the file as it is."""
        self._held = []
        if self._file is not None:
            self._file.close()

    def _flush_held(self, room: int) -> None:
        self._file = self.path.open("wb")
        self._file.write(struct.pack("<Q", room) + b" " * room)
        for data in self._held:
            self._file.write(data)
        self._held = []


def _encoded(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, separators=(",", ":")).encode()


def _bytes(tensor: Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
