"""Named tensors as flat buckets of bytes, the unit of transfers from the trainer's memory."""

from math import prod

import torch
from torch import Tensor

from asympo_megatron.errors import PublishError
from asympo_megatron.protocol import BucketInfo


def bucket_bytes(info: BucketInfo) -> int:
    """Size of a bucket."""
    return sum(_sizes(info))


def split_bucket(info: BucketInfo, data: Tensor) -> dict[str, Tensor]:
    """The tensors of a received bucket, as views of it."""
    parts = data.split(_sizes(info))
    return {
        name: part.view(_dtype(dtype)).view(shape)
        for name, dtype, shape, part in zip(info.names, info.dtypes, info.shapes, parts, strict=True)
    }


def _sizes(info: BucketInfo) -> list[int]:
    return [prod(shape) * _dtype(dtype).itemsize for shape, dtype in zip(info.shapes, info.dtypes, strict=True)]


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise PublishError(f"dtype {name!r} of a bucket is none of torch's; both sides must run a torch that knows it.")
    return dtype
