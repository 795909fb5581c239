"""A bucket in memory that other processes of this machine map, and the message that says where it is.

The message is what SGLang's ``/update_weights_from_tensor`` takes in the format ``flattened_bucket``: a pickled

    {"flattened_tensor": uint8 [bytes], "metadata": [name, shape, dtype, start_idx, end_idx, numel of each tensor]}

in which the tensor stands as torch passes one between processes by name (``rebuild_storage_filename``). Descriptors,
torch's default, can only be passed by a process to its own children.
"""

import base64
import binascii
import io
import pickle
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import reductions

from asympo_megatron.errors import EngineError, PublishError
from asympo_megatron.protocol import BucketInfo
from asympo_megatron.sync.bucket import bucket_bytes, split_bucket

_SHARED_FOLDER = "/dev/shm"
"""Where Linux keeps what is shared by name."""
_MANAGER = re.compile(rb"/[^\0]*/torch-shm-dir-[^/\0]+/manager\.sock")
_HANDLE = re.compile(rb"/torch_\d+_\d+_\d+")


class SharedBuffer:
    """Shared memory for one bucket at a time; it ends with this process at the latest.

    Args:
        size: bytes.

    Raises:
        PublishError: no room for it.
    """

    def __init__(self, size: int) -> None:
        free = shutil.disk_usage(_SHARED_FOLDER).free
        if free < size:  # writing more would kill this process
            raise PublishError(
                f"a bucket of {size} bytes does not fit into {_SHARED_FOLDER}, where {free} are free. Lower "
                "sync.bucket_bytes, give the container more shared memory, or set sync.transport=disk."
            )
        self._storage = torch.UntypedStorage._new_using_filename_cpu(size)
        self._data = torch.empty(0, dtype=torch.uint8).set_(self._storage)
        self.size = size

    def fill(self, data: Tensor) -> None:
        """Copy a bucket in, over the one before it."""
        self._data[: data.numel()].copy_(data)

    def message(self, info: BucketInfo) -> str:
        """What tells one process where the bucket is and what it holds; to be opened once."""
        count = bucket_bytes(info)
        manager, handle, size = self._storage._share_filename_cpu_()
        self._storage._shared_incref()  # the other side's reference: it gives one up when it maps the memory
        storage = _Call(reductions.rebuild_storage_filename, (torch.UntypedStorage, manager, handle, size))
        typed = _Call(reductions.rebuild_typed_storage, (storage, torch.uint8))
        tensor = _Call(reductions.rebuild_tensor, (Tensor, typed, (0, (count,), (1,), False)))
        message = {"flattened_tensor": tensor, "metadata": _metadata(info)}
        return base64.b64encode(pickle.dumps(message)).decode()


@dataclass(frozen=True)
class _Call:
    """Pickled as the call of a function, which is made where it is unpickled."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.arguments


def _metadata(info: BucketInfo) -> list[SimpleNamespace]:
    entries, start = [], 0
    for name, dtype, shape in zip(info.names, info.dtypes, info.shapes, strict=True):
        kind = getattr(torch, dtype)
        size = torch.Size(shape).numel() * kind.itemsize
        entries.append(
            SimpleNamespace(
                name=name, shape=torch.Size(shape), dtype=kind, start_idx=start, end_idx=start + size, numel=size
            )
        )
        start += size
    return entries


def open_message(message: str, load_format: str | None) -> dict[str, Tensor]:
    """The tensors that a message names: views of the sender's memory, to be copied before the answer.

    Args:
        message: base64 of a pickle; see the module.
        load_format: flattened_bucket, or None for a pickled list of (name, tensor) by value or by handle.

    Raises:
        EngineError: it is malformed, asks for anything that is no tensor, or the memory is not there.
    """
    try:
        content = _TensorUnpickler(io.BytesIO(base64.b64decode(message, validate=True))).load()
        if load_format is None:
            tensors = dict(content)
        else:
            flat = content["flattened_tensor"]
            info = _info(content["metadata"])
            tensors = split_bucket(info, flat)
    except (binascii.Error, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise EngineError(f"the serialized tensors cannot be read: {error!r}") from error
    except (pickle.UnpicklingError, RuntimeError, PublishError) as error:
        raise EngineError(f"the serialized tensors cannot be read: {error}") from error
    if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()):
        raise EngineError("the serialized tensors cannot be read: expected pairs of a name and a tensor.")
    return tensors


def _info(metadata: Any) -> BucketInfo:
    names = [entry.name for entry in metadata]
    dtypes = [str(entry.dtype).removeprefix("torch.") for entry in metadata]
    return BucketInfo(names, dtypes, [list(entry.shape) for entry in metadata])


def _rebuild_shared(kind: type, manager: bytes, handle: bytes, size: int) -> torch.UntypedStorage:
    """torch's own function would map, and connect to, whatever it is told."""
    if not (_MANAGER.fullmatch(manager) and _HANDLE.fullmatch(handle)):
        raise pickle.UnpicklingError("it names memory that torch does not share.")
    return reductions.rebuild_storage_filename(kind, manager, handle, size)


def _load_storage(data: bytes) -> Any:
    """torch's own function unpickles freely."""
    return torch.load(io.BytesIO(data), weights_only=True)


_ALLOWED: Mapping[tuple[str, str], Any] = MappingProxyType(
    {
        ("types", "SimpleNamespace"): SimpleNamespace,
        ("collections", "OrderedDict"): dict,
        ("torch", "Tensor"): Tensor,
        ("torch", "Size"): torch.Size,
        ("torch.storage", "UntypedStorage"): torch.UntypedStorage,
        ("torch.storage", "_load_from_bytes"): _load_storage,
        ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
        ("torch.multiprocessing.reductions", "rebuild_tensor"): reductions.rebuild_tensor,
        ("torch.multiprocessing.reductions", "rebuild_typed_storage"): reductions.rebuild_typed_storage,
        ("torch.multiprocessing.reductions", "rebuild_storage_filename"): _rebuild_shared,
    }
)
"""All that a message may ask for; SGLang's own list holds these, too."""


class _TensorUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no part of a tensor.")
