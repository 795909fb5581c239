"""Named tensors as flat buckets of bytes, the unit of the collective transport."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from asympo_megatron.errors import PublishError
from asympo_megatron.protocol import BucketInfo


@dataclass(frozen=True)
class Bucket:
    """Some tensors of one version, concatenated: uint8 [bytes] on the CPU."""

    info: BucketInfo
    data: Tensor


def empty_bucket(info: BucketInfo, device: torch.device | str = "cpu") -> Tensor:
    """Memory to receive a bucket into: uint8 [bytes]."""
    return torch.empty(sum(_sizes(info)), dtype=torch.uint8, device=device)


def split_bucket(info: BucketInfo, data: Tensor) -> dict[str, Tensor]:
    """The tensors of a received bucket, as views of it."""
    parts = data.split(_sizes(info))
    return {
        name: part.view(_dtype(dtype)).view(shape)
        for name, dtype, shape, part in zip(info.names, info.dtypes, info.shapes, parts, strict=True)
    }


def fill_buckets(tensors: Iterable[tuple[str, Tensor]], bucket_bytes: int) -> Iterator[Bucket]:
    """Concatenate tensors into buckets of at most ``bucket_bytes``; a larger tensor has a bucket of its own.

    Tensors of one bucket have one dtype: the receiver refuses a tensor that does not begin at a multiple of its item
    size.

    Raises:
        PublishError: a name was given twice, or no tensor at all.
    """
    seen: set[str] = set()
    held: list[tuple[str, Tensor]] = []
    held_bytes = 0
    for name, tensor in tensors:
        if name in seen:
            raise PublishError(f"tensor {name} was given twice; each name of a version is sent once.")
        seen.add(name)
        if held and (held_bytes + tensor.nbytes > bucket_bytes or tensor.dtype != held[0][1].dtype):
            yield _bucket(held)
            held, held_bytes = [], 0
        held.append((name, tensor.detach().cpu()))
        held_bytes += tensor.nbytes
    if not seen:
        raise PublishError("no tensor was given; a version without weights cannot be sent.")
    yield _bucket(held)


def _bucket(tensors: list[tuple[str, Tensor]]) -> Bucket:
    info = BucketInfo(
        [name for name, _ in tensors],
        [str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors],
        [list(tensor.shape) for _, tensor in tensors],
    )
    return Bucket(info, torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for _, tensor in tensors]))


def _sizes(info: BucketInfo) -> list[int]:
    return [prod(shape) * _dtype(dtype).itemsize for shape, dtype in zip(info.shapes, info.dtypes, strict=True)]


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise PublishError(f"dtype {name!r} of a bucket is none of torch's; both sides must run a torch that knows it.")
    return dtype
