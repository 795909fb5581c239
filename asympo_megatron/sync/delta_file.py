"""What changed between two safetensors files of one layout, as a third one, in which every changed tensor has

    gaps/NAME     I16 [n], unsigned   from each changed element to the next; the first from element 0
    values/NAME   U8|I16|I32|I64 [n]  the new bits of these elements, as integers of their size
    whole/NAME    U8 [bytes]          all its bytes, instead of both, where they would take more room

A gap that 16 bits do not hold is bridged by entries that state again what has not changed. Elements are compared and
written as bits: a NaN equals itself, -0.0 is not 0.0.
"""

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from asympo_megatron.sync.shard_file import ShardFile

_CHUNK = 1 << 22
"""Elements compared at a time."""
_LONGER, _LEAST_BYTES = 4, 4096
"""Room for a header that names up to two entries for each tensor, and longer ones: times the compared files' header."""
_WIDEST_GAP = (1 << 16) - 1
_INTEGERS: Mapping[int, type[np.integer[Any]]] = MappingProxyType({1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64})

Integers = NDArray[Any]


@dataclass(frozen=True)
class _Tensor:
    """Where the bytes of a tensor lie in its file, and the integer that takes one element."""

    name: str
    start: int
    size: int
    kind: type[np.integer[Any]]


def write_changes(old: Path, new: Path, target: Path) -> bool:
    """Write what turns ``old`` into ``new``; both are mapped, never held.

    Returns:
        False, and no file, where the two hold other tensors or hold them elsewhere.

    Raises:
        OSError: ``target`` cannot be written.
    """
    header = _read_header(new)
    if header != _read_header(old):
        return False
    file = ShardFile(target, _LONGER * len(header) + _LEAST_BYTES)
    try:
        for tensor in _tensors(header):
            for prefix, data in _changes(_mapped(old, tensor), _mapped(new, tensor)):
                file.add(f"{prefix}/{tensor.name}", torch.from_numpy(data))
        file.close()
    finally:
        file.abandon()
    return True


def apply_changes(base: Path, changes: Sequence[Path], target: Path) -> str:
    """Write ``base`` with changes applied one after the other; one tensor in memory at a time.

    Returns:
        Hexadecimal sha256 of what was written.

    Raises:
        OSError: a file cannot be read or written.
        ValueError, IndexError, SafetensorError: these are no changes of this file.
    """
    digest = hashlib.sha256()
    with ExitStack() as stack, target.open("wb") as out:
        for piece in _pieces(base, [stack.enter_context(safe_open(path, "numpy")) for path in changes]):
            digest.update(piece)
            out.write(piece)
    return digest.hexdigest()


def _pieces(base: Path, changes: Sequence[Any]) -> Iterator[Any]:
    header, names = _read_header(base), [set(file.keys()) for file in changes]
    yield header
    with base.open("rb") as data:
        data.seek(len(header))
        for tensor in _tensors(header):
            elements = np.fromfile(data, tensor.kind, tensor.size // np.dtype(tensor.kind).itemsize)
            for file, held in zip(changes, names, strict=True):
                if f"whole/{tensor.name}" in held:
                    elements = file.get_tensor(f"whole/{tensor.name}").view(tensor.kind)
                elif f"gaps/{tensor.name}" in held:
                    positions = np.cumsum(file.get_tensor(f"gaps/{tensor.name}").view(np.uint16), dtype=np.int64)
                    elements[positions] = file.get_tensor(f"values/{tensor.name}")
            yield elements.data


def _changes(old: Integers, new: Integers) -> list[tuple[str, Integers]]:
    """The entries of one tensor; none where nothing changed."""
    most = new.nbytes // (2 + new.itemsize)
    gaps: list[Integers] = []
    values: list[Integers] = []
    count, last = 0, 0
    for start in range(0, new.size, _CHUNK):
        positions = np.flatnonzero(old[start : start + _CHUNK] != new[start : start + _CHUNK]) + start
        if positions.size == 0:
            continue
        positions = _bridged(positions, last)
        count += positions.size
        if count > most:
            return [("whole", np.array(new).view(np.uint8))]
        gaps.append(np.diff(positions, prepend=last).astype(np.uint16).view(np.int16))
        values.append(np.asarray(new[positions]))
        last = positions[-1]
    return [("gaps", np.concatenate(gaps)), ("values", np.concatenate(values))] if gaps else []


def _bridged(positions: NDArray[np.int64], last: int) -> NDArray[np.int64]:
    """Ascending positions after ``last`` with others between, so that no two are further apart than a gap can say."""
    bridges = np.maximum(np.diff(positions, prepend=last) - 1, 0) // _WIDEST_GAP
    if not bridges.any():
        return positions
    number = np.arange(bridges.sum()) - np.repeat(np.cumsum(bridges) - bridges, bridges)
    return np.sort(np.concatenate([positions, np.repeat(positions, bridges) - _WIDEST_GAP * (number + 1)]))


def _read_header(file: Path) -> bytes:
    """Everything before the data."""
    with file.open("rb") as data:
        length = data.read(8)
        return length + data.read(struct.unpack("<Q", length)[0])


def _tensors(header: bytes) -> list[_Tensor]:
    """In the order of the file, which has no holes; those without elements are left out."""
    entries = json.loads(header[8:])
    entries.pop("__metadata__", None)
    found = []
    for name, entry in entries.items():
        start, end = entry["data_offsets"]
        width, rest = divmod(end - start, max(1, int(np.prod(entry["shape"], dtype=np.int64))))
        kind = _INTEGERS.get(width, np.uint8) if rest == 0 else np.uint8
        if end > start:
            found.append(_Tensor(name, len(header) + start, end - start, kind))
    return sorted(found, key=lambda tensor: tensor.start)


def _mapped(file: Path, tensor: _Tensor) -> Integers:
    count = tensor.size // np.dtype(tensor.kind).itemsize
    return np.memmap(file, tensor.kind, "r", tensor.start, (count,))
