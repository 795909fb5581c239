"""Megatron's ``torch_dist`` checkpoints tensor by tensor, in one process: no model, no process group.

Megatron's own reader unpickles whatever the files say. A checkpoint that comes from elsewhere is data: here only the
few classes that describe tensors are unpickled (``plain_pickle``), and weights are bytes.
"""

import io
import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, SavePlan
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.serialization import get_crc32_options, set_crc32_options

from asympo_megatron.conversion.places import Place
from asympo_megatron.conversion.plain_pickle import UnsafePickleError, load_arguments, load_metadata
from asympo_megatron.conversion.stored_tensor import map_stored
from asympo_megatron.errors import CheckpointError
from asympo_megatron.files import Flusher
from asympo_megatron.mcore.shards import VOCABULARY

METADATA, CONFIG, COMMON, DATA = ".metadata", "metadata.json", "common.pt", "__0_0.distcp"
SHARED_STATE = "common_state/shard_0_1"
"""What ``common.pt`` holds, as Megatron-Core 0.19 keeps it: a pickle among the tensors."""

_CONFIG = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class TorchDistFiles:
    """The tensors of one checkpoint directory.

    Raises:
        CheckpointError: not a ``torch_dist`` checkpoint, damaged, or holding pickled code.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._metadata = self._read_metadata()

    def read(self, place: Place) -> Tensor:
        """One whole parameter, without vocabulary padding; its memory may be the file's.

        Raises:
            CheckpointError: it is not there, smaller than the model needs, or its file is damaged.
        """
        key, described, stack = self._find(place)
        axes = len(stack)
        size = tuple(described.size)
        wanted = (*place.stack_shape[len(place.stack) - axes :], *place.shape)
        padding = size[axes] - wanted[axes] if place.name in VOCABULARY else 0  # up to the layout that saved it
        if padding < 0 or size != (*wanted[:axes], wanted[axes] + padding, *wanted[axes + 1 :]):
            raise CheckpointError(
                f"{self.directory}: {key} has shape {size}, but config.json says {wanted}. "
                "Give the config.json of this checkpoint's model."
            )
        box = ChunkStorageMetadata(
            torch.Size([*stack, *[0] * len(place.shape)]), torch.Size([1] * axes + [*place.shape])
        )
        if box in described.chunks:  # as it was saved: no need to cut it against all others
            described = replace(described, chunks=[box])
        items = create_read_items_for_chunk_list(key, described, [box])
        if sum(math.prod(item.lengths) for item in items) != math.prod(box.sizes):
            raise CheckpointError(f"{self.directory}: {key} is not complete: shards of it are missing. Save it again.")
        with self._readable(key):
            if len(items) == 1:
                whole = self._stored(items[0]).reshape(place.shape)
            else:
                whole = torch.empty(tuple(box.sizes), dtype=described.properties.dtype)
                for item in items:
                    region = zip(item.dest_offsets, item.lengths, strict=True)
                    whole[tuple(slice(start, start + length) for start, length in region)] = self._stored(item)
        dtype = described.properties.dtype
        if whole.dtype != dtype:
            raise CheckpointError(
                f"{self.directory}: {key} is stored as {whole.dtype}, but {METADATA} says {dtype}. Copy both again."
            )
        return whole.reshape(place.shape)

    def dtype(self, place: Place) -> torch.dtype:
        """Of one parameter.

        Raises:
            CheckpointError: it is not there.
        """
        return self._find(place)[1].properties.dtype

    def _stored(self, item: ReadItem) -> Tensor:
        """A region of one stored tensor."""
        place = self._metadata.storage_data[item.storage_index]
        tensor = map_stored(self.directory / place.relative_path, place.offset, place.length)
        region = zip(item.storage_offsets, item.lengths, strict=True)
        return tensor[tuple(slice(start, start + length) for start, length in region)]

    def arguments(self) -> dict[str, Any]:
        """Training arguments that Megatron-LM stored, read without importing a class of theirs; empty if none are.

        Raises:
            CheckpointError: what holds them is damaged.
        """
        file, start, size = self.directory / COMMON, 0, -1
        if not file.is_file():
            place = self._metadata.storage_data.get(MetadataIndex(SHARED_STATE))
            if place is None:
                return {}
            file, start, size = self.directory / place.relative_path, place.offset, place.length
        try:
            with file.open("rb") as stream:
                stream.seek(start)
                return load_arguments(io.BytesIO(stream.read(size)))
        except Exception as error:  # a damaged pickle raises many kinds
            raise CheckpointError(f"{file} cannot be read: {error!r}. Copy it again.") from error

    def unread(self, places: Iterable[Place]) -> list[str]:
        """Keys of model tensors that belong to none of ``places``: another architecture would lose them silently."""
        known = {self._find(place)[0] for place in places}
        model = ("embedding.", "decoder.", "output_layer.")
        return sorted(
            key
            for key, entry in self._metadata.state_dict_metadata.items()
            if key.startswith(model) and key not in known and isinstance(entry, TensorStorageMetadata)
        )

    def _find(self, place: Place) -> tuple[str, TensorStorageMetadata, tuple[int, ...]]:
        entries = self._metadata.state_dict_metadata
        for key, stack in place.spellings():
            entry = entries.get(key)
            if not isinstance(entry, TensorStorageMetadata) or len(entry.size) != len(stack) + len(place.shape):
                continue
            if all(index < size for index, size in zip(stack, entry.size, strict=False)):
                return key, entry, stack
        raise CheckpointError(
            f"{self.directory} lacks {place.key}{list(place.stack) or ''} ({place.name}). Give the config.json of this "
            "checkpoint's model."
        )

    def _read_metadata(self) -> Metadata:
        try:
            backend = json.loads((self.directory / CONFIG).read_text())["sharded_backend"]
        except (OSError, ValueError, KeyError, TypeError):
            raise CheckpointError(
                f"{self.directory} is no Megatron checkpoint: it has no readable {CONFIG}. "
                "Give the directory that holds it, e.g. iter_0000100."
            ) from None
        if backend != "torch_dist":
            raise CheckpointError(
                f"{self.directory} has the format {backend!r}; only torch_dist is read (Megatron-LM: --ckpt-format)."
            )
        try:
            metadata = load_metadata(self.directory / METADATA)
            stored = {_described(place) for place in metadata.storage_data.values()}
            for entry in metadata.state_dict_metadata.values():
                _check_entry(entry)
        except UnsafePickleError as error:
            raise CheckpointError(f"{self.directory / METADATA} is refused: {error}") from error
        except Exception as error:  # of whatever kind: a damaged pickle raises many
            raise CheckpointError(f"{self.directory / METADATA} cannot be read: {error!r}. Copy it again.") from error
        for file in stored:
            if Path(file).name != file:
                raise CheckpointError(f"{self.directory / METADATA} names the file {file!r}; expected one beside it.")
            if not (self.directory / file).is_file():
                raise CheckpointError(f"{self.directory / file} is missing. Copy the checkpoint again.")
        return metadata

    @contextmanager
    def _readable(self, key: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # torch.load of damaged bytes raises many kinds
            raise CheckpointError(
                f"{self.directory}: {key} cannot be read: {type(error).__name__}. Copy the damaged files again."
            ) from error


def _described(place: Any) -> str:
    """The file of a stored tensor or object."""
    if not (type(place.offset) is type(place.length) is int and place.offset >= 0 <= place.length):
        raise ValueError(f"a place from {place.offset!r} of {place.length!r} bytes")
    return str(place.relative_path)


def _check_entry(entry: Any) -> None:
    """An unpickled description has all of its attributes."""
    if isinstance(entry, TensorStorageMetadata):
        boxes = [entry.size, *(box for chunk in entry.chunks for box in (chunk.offsets, chunk.sizes))]
        if not isinstance(entry.properties.dtype, torch.dtype) or {len(box) for box in boxes} != {len(entry.size)}:
            raise ValueError("a tensor without a shape or dtype")


def write_torch_dist(
    directory: Path, places: list[Place], dtypes: list[torch.dtype], read: Callable[[int], Tensor]
) -> None:
    """Write a checkpoint that Megatron loads in any layout; one tensor is in memory at a time.

    Args:
        directory: exists and is empty.
        places: of all parameters, ``dtypes`` theirs.
        read: parameter number i, called once each, in order.
    """
    items = [_write_item(place, dtype) for place, dtype in zip(places, dtypes, strict=True)]
    _, metadata = create_default_global_save_plan([SavePlan(items)])
    results = []
    with (directory / DATA).open("wb") as stream, Flusher(stream) as flusher, _without_crc():
        for number, item in enumerate(items):
            start = stream.tell()
            torch.save(_alone(read(number)).reshape(_sizes(item)), stream)
            length = stream.tell() - start
            results.append(WriteResult(item.index, length, _StorageInfo(DATA, start, length)))
            flusher.wrote(length)
    _Writer(directory).finish(metadata, [results])
    torch.save({}, directory / COMMON)
    (directory / CONFIG).write_text(json.dumps(_CONFIG))


class _Writer(FileSystemWriter):
    def storage_meta(self) -> None:
        """None: it would keep the temporary name of the directory."""


@contextmanager
def _without_crc() -> Iterator[None]:
    """torch.load never looks at the checksums that torch.save computes."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)


def _alone(tensor: Tensor) -> Tensor:
    """The same memory as a storage of its own: torch.save writes whole storages, and this one may be a mapped file."""
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    flat = tensor.contiguous().reshape(-1)
    return torch.frombuffer(flat.view(torch.uint8).numpy(), dtype=tensor.dtype)


def _sizes(item: WriteItem) -> tuple[int, ...]:
    assert item.tensor_data is not None
    return tuple(item.tensor_data.chunk.sizes)


def _write_item(place: Place, dtype: torch.dtype) -> WriteItem:
    offset = torch.Size([*place.stack, *[0] * len(place.shape)])
    sizes = torch.Size([*[1] * len(place.stack), *place.shape])
    data = TensorWriteData(
        chunk=ChunkStorageMetadata(offset, sizes),
        properties=TensorProperties(dtype=dtype),
        size=torch.Size([*place.stack_shape, *place.shape]),
    )
    return WriteItem(MetadataIndex(place.key, offset), WriteItemType.SHARD, tensor_data=data)
