"""A checksum of all weights that is the same in every layout that holds the same weights."""

import hashlib
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch
import torch.distributed as dist
from torch import Tensor

from asympo_megatron.mcore.shards import Shard

CHUNK_ELEMENTS: Mapping[str, int] = MappingProxyType({"cpu": 1 << 17, "cuda": 1 << 22})
"""Elements summed at a time: an int64 buffer that stays in a core's cache, or one worth a kernel."""

# Odd multipliers of splitmix64 as signed integers; int64 tensors wrap around exactly.
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)

_PART_BITS, _PARTS = 22, 3
"""A multiplier in parts for float64 products: 2^15 (bits of a weight) x 2^22 x ``_EXACT_ROWS`` are 2^53, all exact."""
_EXACT_ROWS = 1 << 16

_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@torch.no_grad()
def weights_checksum(shards: Iterable[Shard]) -> str:
    """Collective: 16 hexadecimal digits that identify the weights bit by bit.

    Every element contributes its bits times an odd number of its row times one of its column, both hashed from the
    global name and index, and contributions are summed modulo 2^64: the sum knows neither order nor layout, and costs
    three passes over the weights. Each global element is counted by exactly one rank, and one all-reduce of one integer
    joins them. It finds accidents, not an adversary.
    """
    total: Tensor | None = None
    for shard in shards:
        if total is None:
            total = torch.zeros((), dtype=torch.int64, device=shard.param.device)
        replicated = shard.dim is None and shard.rank > 0
        if not (shard.replica > 0 or replicated or shard.is_copy):
            total += _shard_sum(shard)
    assert total is not None
    if dist.get_world_size() > 1:
        dist.all_reduce(total)
    return _digits(total)


class WholeChecksum:
    """The same checksum from whole parameters, added one by one in any order."""

    def __init__(self) -> None:
        self._total = torch.zeros((), dtype=torch.int64)

    def add(self, name: str, whole: Tensor) -> None:
        """Count one parameter, given by its global name, without vocabulary padding."""
        columns = torch.arange(whole.shape[1] if whole.dim() == 2 else 1)
        self._total += _sum(name, whole, torch.arange(whole.shape[0]), columns)

    def digits(self) -> str:
        """The checksum of everything added."""
        return _digits(self._total)


def _digits(total: Tensor) -> str:
    return f"{int(total.item()) & (1 << 64) - 1:016x}"


def _shard_sum(shard: Shard) -> Tensor:
    param = shard.param.detach()
    rows = shard.rows()
    keep = int((rows < shard.true_rows).sum()) if shard.global_shape[0] != shard.true_rows else len(rows)
    return _sum(shard.name, param[:keep], rows[:keep], shard.columns())


def _sum(name: str, param: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Contributions of the elements at (rows, columns) of a global parameter."""
    bits = param.view(_BITS[param.dtype]).reshape(param.shape[0], -1)
    salt = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)
    of_row = _mix(rows * _GOLDEN + salt) | 1
    of_column = _mix(columns * _GOLDEN + ~salt) | 1
    on_cpu = param.device.type == "cpu"
    step = max(1, CHUNK_ELEMENTS["cpu" if on_cpu else "cuda"] // max(1, bits.shape[1]))
    if on_cpu and bits.dtype == torch.int16:
        return _sum_in_float64(bits, of_row, of_column, step)
    total = torch.zeros((), dtype=torch.int64, device=param.device)
    buffer = torch.empty((min(step, len(bits)), bits.shape[1]), dtype=torch.int64, device=param.device)
    for start in range(0, len(bits), step):
        part = slice(start, min(start + step, len(bits)))
        values = buffer[: part.stop - start].copy_(bits[part])
        # The product of integers that stores no products exists for CPUs only.
        sums = torch.mv(values, of_column) if on_cpu else values.mul_(of_column).sum(1)
        total += sums.mul_(of_row[part]).sum()
    return total


def _sum_in_float64(bits: Tensor, of_row: Tensor, of_column: Tensor, step: int) -> Tensor:
    """The same sum of 16-bit weights: CPUs multiply matrices of float64 twice as fast as vectors of int64."""
    mask = (1 << _PART_BITS) - 1
    parts = torch.stack([of_row & mask, of_row >> _PART_BITS & mask, of_row >> 2 * _PART_BITS]).double()
    buffer = torch.empty((min(step, len(bits)), bits.shape[1]), dtype=torch.float64)
    total = torch.zeros(bits.shape[1], dtype=torch.int64)
    for first in range(0, len(bits), _EXACT_ROWS):
        last = min(first + _EXACT_ROWS, len(bits))
        of_parts = torch.zeros((_PARTS, bits.shape[1]), dtype=torch.float64)
        for start in range(first, last, step):
            part = slice(start, min(start + step, last))
            of_parts.addmm_(parts[:, part], buffer[: part.stop - start].copy_(bits[part]))
        for number, of_part in enumerate(of_parts.long()):
            total += of_part << number * _PART_BITS
    return torch.dot(total, of_column)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser, with arithmetic shifts; in place, ``x`` is a temporary of the caller."""
    x ^= x >> 30
    x *= _MIX_1
    x ^= x >> 27
    x *= _MIX_2
    x ^= x >> 31
    return x
