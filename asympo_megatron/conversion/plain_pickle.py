"""Pickles of other people's checkpoints, read as data: a class that is not on the list is never imported."""

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.metadata import Metadata

_CHECKPOINT = "torch.distributed.checkpoint."
_DESCRIPTIONS = {
    _CHECKPOINT + "metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    _CHECKPOINT + "planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    _CHECKPOINT + "filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed._shard.sharded_tensor.metadata": {"TensorProperties", "MEM_FORMAT_ENCODING"},
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
    "builtins": {"set", "frozenset"},
}
"""What the metadata of a checkpoint consists of: descriptions without behavior."""


_STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
}
"""Of weights; all else, fp8 say, is refused."""


class UnsafePickleError(pickle.UnpicklingError):
    """A pickle that asks for a class or function which describes no tensor."""


def load_metadata(file: Path) -> Metadata:
    """Read ``.metadata``.

    Raises:
        UnsafePickleError: it asks for anything else than descriptions of tensors.
    """
    with file.open("rb") as stream:
        metadata = _Descriptions(stream).load()
    if not isinstance(metadata, Metadata):
        raise UnsafePickleError(f"it holds a {type(metadata).__name__}, expected the metadata of a checkpoint.")
    return metadata


@dataclass(frozen=True)
class StoredTensor:
    """What torch.save writes of a tensor beside its numbers; strides and offset in elements of its only storage."""

    dtype: torch.dtype
    storage: str
    elements: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the storage."""
        return self.elements * self.dtype.itemsize


def load_tensor_description(data: bytes) -> StoredTensor:
    """Read ``data.pkl`` of an archive that holds one tensor or parameter, without its numbers.

    Raises:
        UnsafePickleError: it holds or asks for anything else.
    """
    described = _TensorDescription(io.BytesIO(data)).load()
    if not isinstance(described, StoredTensor):
        raise UnsafePickleError(f"it holds a {type(described).__name__}, expected a tensor.")
    return described


def load_arguments(stream: BinaryIO) -> dict[str, Any]:
    """The training arguments of Megatron-LM in the state shared by all ranks, as plain values; empty if there are none.

    Objects of any class become inert: their attributes are kept, their class is not imported.
    """
    state = torch.load(stream, map_location="cpu", weights_only=False, pickle_module=_Inert)
    if isinstance(state, list) and len(state) == 1:  # a sharded object lists its shards
        (state,) = state
    arguments = state.get("args") if isinstance(state, dict) else None
    return dict(vars(arguments)) if isinstance(arguments, SimpleNamespace) else {}


class _Descriptions(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _DESCRIPTIONS.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise UnsafePickleError(f"it asks for {module}.{name}, which describes no tensor. Do not trust this file.")


def _tensor(storage: tuple[torch.dtype, str, int], offset: int, shape: Any, strides: Any, *_: Any) -> StoredTensor:
    """In place of torch._utils._rebuild_tensor_v2."""
    dtype, key, elements = storage
    return StoredTensor(dtype, key, elements, offset, tuple(shape), tuple(strides))


class _TensorDescription(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return _tensor
        if module == "torch._utils" and name == "_rebuild_parameter":
            return lambda data, *_: data
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        raise UnsafePickleError(f"it asks for {module}.{name}, which is no part of a tensor. Do not trust this file.")

    def persistent_load(self, pid: Any) -> tuple[torch.dtype, str, int]:
        _, dtype, key, _, elements = pid
        return dtype, key, elements


class _Anything(SimpleNamespace):
    """Stands for an object of any class."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            vars(self).update({str(name): value for name, value in state.items()})

    def __call__(self, *_: Any) -> "_Anything":
        return _Anything()

    def __hash__(self) -> int:  # type: ignore[override]  # it may be a key or in a set
        return id(self)


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _Anything


class _Inert:
    """A ``pickle_module`` for torch.load that imports nothing."""

    Unpickler = _InertUnpickler

    @staticmethod
    def load(stream: io.BufferedIOBase, **_: Any) -> Any:
        return _InertUnpickler(stream).load()
