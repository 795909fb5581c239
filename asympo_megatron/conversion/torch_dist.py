"""Megatron's ``torch_dist`` checkpoints tensor by tensor, in one process: no model, no process group.

Megatron's own reader unpickles whatever the files say. A checkpoint that comes from elsewhere is data: here only the
few classes that describe tensors are unpickled (``plain_pickle``), and weights by PyTorch's weights-only loader.
"""

import io
import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, LoadPlan, SavePlan
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    ReadItem,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from asympo_megatron.conversion.places import Place
from asympo_megatron.conversion.plain_pickle import UnsafePickleError, load_arguments, load_metadata
from asympo_megatron.errors import CheckpointError
from asympo_megatron.mcore.shards import VOCABULARY

METADATA, CONFIG, COMMON = ".metadata", "metadata.json", "common.pt"
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
        self._reader = FileSystemReader(self.directory)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def read(self, place: Place) -> Tensor:
        """One whole parameter, without vocabulary padding.

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
        whole = torch.empty(tuple(box.sizes), dtype=described.properties.dtype)
        items = create_read_items_for_chunk_list(key, described, [box])
        if sum(math.prod(item.lengths) for item in items) != whole.numel():
            raise CheckpointError(f"{self.directory}: {key} is not complete: shards of it are missing. Save it again.")
        with self._readable(key):
            self._reader.read_data(LoadPlan(items), _Into(whole))
        return whole.reshape(place.shape)

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
        for key, stack in ((place.key, place.stack), place.key_of_single_layer() or (place.key, place.stack)):
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
            stored = {str(info.relative_path) for info in metadata.storage_data.values()}
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


class _Into(DefaultLoadPlanner):
    """Puts what is read into one tensor."""

    def __init__(self, whole: Tensor) -> None:
        super().__init__()
        self._whole = whole

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        box = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self._whole[tuple(slice(start, start + length) for start, length in box)]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


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
    writer = _Writer(directory, single_file_per_rank=True, sync_files=True, thread_count=1)
    writer.set_up_storage_writer(is_coordinator=True)
    plans, metadata = create_default_global_save_plan([SavePlan(items)])
    (plan,) = writer.prepare_global_plan([writer.prepare_local_plan(plans[0])])
    results = writer.write_data(plan, _Lazy({item.index: number for number, item in enumerate(items)}, read))
    writer.finish(metadata, [results.value()])
    torch.save({}, directory / COMMON)
    (directory / CONFIG).write_text(json.dumps(_CONFIG))


class _Writer(FileSystemWriter):
    def storage_meta(self) -> None:
        """None: it would keep the temporary name of the directory."""


def _write_item(place: Place, dtype: torch.dtype) -> WriteItem:
    offset = torch.Size([*place.stack, *[0] * len(place.shape)])
    sizes = torch.Size([*[1] * len(place.stack), *place.shape])
    data = TensorWriteData(
        chunk=ChunkStorageMetadata(offset, sizes),
        properties=TensorProperties(dtype=dtype),
        size=torch.Size([*place.stack_shape, *place.shape]),
    )
    return WriteItem(MetadataIndex(place.key, offset), WriteItemType.SHARD, tensor_data=data)


@dataclass(frozen=True)
class _Lazy(SavePlanner):
    """Gives a tensor to the writer when its turn comes."""

    number_of: dict[MetadataIndex, int]
    read: Callable[[int], Tensor]

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        assert write_item.tensor_data is not None
        tensor = self.read(self.number_of[write_item.index])
        return tensor.reshape(tuple(write_item.tensor_data.chunk.sizes))

    def set_up_planner(self, *_: Any, **__: Any) -> None: ...

    def create_local_plan(self) -> SavePlan:
        raise AssertionError("the plan is made by write_torch_dist")

    create_global_plan = finish_plan = create_local_plan  # type: ignore[assignment]
