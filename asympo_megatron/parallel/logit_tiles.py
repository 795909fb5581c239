"""The [T, V] logits of one vocabulary shard, one tile at a time, and what a softmax needs to know of them.

Axis suffixes: T local packed tokens, C tokens of one tile, H hidden, V rows of the local vocabulary shard, B rows of
one tile of it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

TILE_BYTES = 64 * 2**20
"""Default size of one tile of float32 logits, 4096 x 4096: products of that shape run at full speed on any device."""
CPU_TILE_BYTES = 16 * 2**20
"""The same on a CPU, 2048 x 2048: the passes of the softmax over a tile then find it in the cache."""

_FAR_BELOW = -1e4
"""exp of it is 0 in every dtype, and unlike -inf it can be multiplied by 0."""


def default_tile_bytes(device: torch.device) -> int:
    """Of a tile of float32 logits."""
    return CPU_TILE_BYTES if device.type == "cpu" else TILE_BYTES


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax and sums: at least float32."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class LogitTiles:
    """How the logits are cut, and what they are.

    Args:
        tile: tokens and vocabulary rows of one tile; None: square within ``most_bytes``, as far as T and V allow.
        first_id: vocabulary id of the shard's first row.
        real_rows: rows of the shard in front of the padding.
        inverse_temperature: factor of the logits.
        most_bytes: of a tile of float32 logits, where ``tile`` is None.
    """

    tile: tuple[int, int] | None
    first_id: int
    real_rows: int
    inverse_temperature: float
    most_bytes: int = TILE_BYTES

    def shape(self, tokens: int) -> tuple[int, int]:
        """Tokens and vocabulary rows of the largest tile, both at least 1."""
        if self.tile is not None:
            return self.tile
        entries = self.most_bytes // 4
        narrow = max(1, min(math.isqrt(entries), self.real_rows))
        tile_tokens = max(1, min(tokens, entries // narrow))
        return tile_tokens, max(1, min(self.real_rows, entries // tile_tokens))

    def token_parts(self, tokens: int) -> Iterator[slice]:
        """The token ranges of the tiles; without any token one empty range."""
        return _parts(tokens, self.shape(tokens)[0]) if tokens else iter([slice(0, 0)])

    def row_parts(self, tokens: int) -> Iterator[slice]:
        """The vocabulary ranges of the tiles, as rows of the shard; none where the whole shard is padding."""
        return _parts(self.real_rows, self.shape(tokens)[1])

    def columns(self, target_C: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Which targets lie in ``rows``, and their columns in the tile (0 for the others)."""
        column_C = target_C - (self.first_id + rows.start)
        inside_C = (column_C >= 0) & (column_C < rows.stop - rows.start)
        return inside_C, torch.where(inside_C, column_C, 0)


class TileBuffer:
    """Memory for one tile, used again for every tile: fresh pages for each would cost as much as the exponentials."""

    def __init__(self, tiles: LogitTiles, hidden_TH: Tensor, *, spare: bool) -> None:
        tokens, rows = tiles.shape(hidden_TH.shape[0])
        entries = min(tokens, hidden_TH.shape[0]) * min(rows, tiles.real_rows)
        self._factor = tiles.inverse_temperature
        self._product = hidden_TH.new_empty(entries)
        wide = wide_dtype(hidden_TH.dtype)
        self._wide = self._product if hidden_TH.dtype == wide else hidden_TH.new_empty(entries, dtype=wide)
        self._spare = torch.empty_like(self._wide) if spare else self._wide[:0]

    def logits(self, hidden_CH: Tensor, weight_BH: Tensor) -> Tensor:
        """[C, B] in the wide dtype, to be overwritten by the caller; it lives until the next call."""
        shape = hidden_CH.shape[0], weight_BH.shape[0]
        torch.mm(hidden_CH, weight_BH.t(), out=_view(self._product, shape))
        wide_CB = _view(self._wide, shape)
        if self._wide is not self._product:
            wide_CB.copy_(_view(self._product, shape))
        return wide_CB if self._factor == 1.0 else wide_CB.mul_(self._factor)

    def for_product(self, wide_CB: Tensor) -> Tensor:
        """What :meth:`logits` returned, in the dtype of the hidden states."""
        if self._wide is self._product:
            return wide_CB
        return _view(self._product, (wide_CB.shape[0], wide_CB.shape[1])).copy_(wide_CB)

    def spare(self, wide_CB: Tensor) -> Tensor:
        """Uninitialised memory of the same shape; only of a buffer made with ``spare``."""
        return _view(self._spare, (wide_CB.shape[0], wide_CB.shape[1]))


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left right, in the dtype of ``total``."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


@dataclass(frozen=True)
class SoftmaxSums:
    """Of each token, over some part of the vocabulary.

    Args:
        top_T: max z; -inf over nothing.
        sum_T: sum exp(z - top).
        target_T: z of the target where it is in the part, else 0.
        shifted_T: sum exp(z - top) (z - top), for the entropy, or None.
    """

    top_T: Tensor
    sum_T: Tensor
    target_T: Tensor
    shifted_T: Tensor | None

    def relative_to(self, top_T: Tensor) -> "SoftmaxSums":
        """The same sums with exponents relative to a larger maximum."""
        drop_T = (self.top_T - top_T).clamp(min=_FAR_BELOW)
        scale_T = drop_T.exp()
        shifted_T = None if self.shifted_T is None else (self.shifted_T + self.sum_T * drop_T) * scale_T
        return SoftmaxSums(top_T, self.sum_T * scale_T, self.target_T, shifted_T)


def shard_sums(
    hidden_TH: Tensor, weight_VH: Tensor, target_T: Tensor, tiles: LogitTiles, with_entropy: bool
) -> SoftmaxSums:
    """The sums over the local shard, tile by tile with a running maximum."""
    tokens = hidden_TH.shape[0]
    buffer = TileBuffer(tiles, hidden_TH, spare=with_entropy)
    parts = []
    for part in tiles.token_parts(tokens):
        sums = _nothing(hidden_TH[part], with_entropy)
        for rows in tiles.row_parts(tokens):
            logits_CB = buffer.logits(hidden_TH[part], weight_VH[rows])
            sums = _with_tile(sums, logits_CB, tiles.columns(target_T[part], rows), buffer)
        parts.append(sums)
    return _join(parts)


def _nothing(hidden_CH: Tensor, with_entropy: bool) -> SoftmaxSums:
    zero_C = hidden_CH.new_zeros(hidden_CH.shape[0], dtype=wide_dtype(hidden_CH.dtype))
    return SoftmaxSums(torch.full_like(zero_C, -torch.inf), zero_C, zero_C, zero_C if with_entropy else None)


def _with_tile(sums: SoftmaxSums, logits_CB: Tensor, columns: tuple[Tensor, Tensor], buffer: TileBuffer) -> SoftmaxSums:
    inside_C, column_C = columns
    own_C = logits_CB.gather(1, column_C[:, None]).squeeze(1)
    target_C = torch.where(inside_C, own_C, sums.target_T)
    sums = sums.relative_to(torch.maximum(sums.top_T, logits_CB.amax(1)))
    logits_CB.sub_(sums.top_T[:, None])
    if sums.shifted_T is None:
        return SoftmaxSums(sums.top_T, sums.sum_T + logits_CB.exp_().sum(1), target_C, None)
    exp_CB = torch.exp(logits_CB, out=buffer.spare(logits_CB))
    sum_C = sums.sum_T + exp_CB.sum(1)
    return SoftmaxSums(sums.top_T, sum_C, target_C, sums.shifted_T + exp_CB.mul_(logits_CB).sum(1))


def _join(parts: list[SoftmaxSums]) -> SoftmaxSums:
    shifted = [part.shifted_T for part in parts if part.shifted_T is not None]
    return SoftmaxSums(
        torch.cat([part.top_T for part in parts]),
        torch.cat([part.sum_T for part in parts]),
        torch.cat([part.target_T for part in parts]),
        torch.cat(shifted) if shifted else None,
    )


def _parts(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, step):
        yield slice(start, min(size, start + step))


def _view(flat: Tensor, shape: tuple[int, int]) -> Tensor:
    return flat[: shape[0] * shape[1]].view(shape)
