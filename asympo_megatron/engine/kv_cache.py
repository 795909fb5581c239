"""Keys and values of a left-padded batch whose rows join and leave between decode steps.

Axis suffixes: B rows, L cached positions (left-padded: the newest token of every row is the last column).
"""

from collections.abc import Sequence as Rows

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

# Spare columns of a fresh buffer: a row of the batch is copied once in this many decode steps.
_SPARE_COLUMNS = 32


class BatchLayer(DynamicLayer):
    """One layer's keys and values: views of buffers with room for further columns."""

    def __init__(self) -> None:
        super().__init__()
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append columns; return all keys and values. (The signature is transformers'.)"""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self._buffers is None or self._buffers[0].shape[-2] < end:
            keys = _with_room(key_states, end)
            values = _with_room(value_states, end)
            if start:
                keys[:, :, :start], values[:, :, :start] = self.columns()
            self._buffers = keys, values
        keys, values = self._buffers
        keys[:, :, start:end], values[:, :, start:end] = key_states, value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        return self.keys, self.values

    def columns(self) -> tuple[Tensor, Tensor]:
        """Keys and values [B, heads, L, dim] of a layer that holds some."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def assemble(self, parts: Rows[tuple["BatchLayer", Tensor | None]], length: int) -> None:
        """Become the rows of ``parts`` one after the other, each right-aligned in ``length`` columns."""
        held = [(*layer.columns(), rows) for layer, rows in parts]
        keys = _stacked([(keys, rows) for keys, _, rows in held], length)
        values = _stacked([(values, rows) for _, values, rows in held], length)
        self._buffers = keys, values
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True


def _with_room(states: Tensor, length: int) -> Tensor:
    rows, heads, _, dim = states.shape
    # Growth by a half keeps the copies of a long response linear in its length.
    return states.new_empty(rows, heads, length + max(_SPARE_COLUMNS, length // 2), dim)


def _stacked(parts: list[tuple[Tensor, Tensor | None]], length: int) -> Tensor:
    sizes = [states.shape[0] if rows is None else rows.shape[0] for states, rows in parts]
    buffer = _with_room(parts[0][0][:1].expand(sum(sizes), -1, -1, -1), length)
    for (states, rows), block in zip(parts, buffer[:, :, :length].split(sizes), strict=True):
        kept = min(states.shape[-2], length)
        newest = states[:, :, states.shape[-2] - kept :]
        # Padding is masked, but a masked NaN would still poison the weighted sum of values.
        block[:, :, : length - kept] = 0
        block[:, :, length - kept :] = newest if rows is None else newest[rows]
    return buffer


class BatchCache(Cache):
    """The cache of a batch, one :class:`BatchLayer` a model layer, full length also where attention slides."""

    def __init__(self, num_layers: int) -> None:
        self.batch_layers = [BatchLayer() for _ in range(num_layers)]
        super().__init__(layers=list(self.batch_layers))

    @staticmethod
    def assembled(parts: Rows[tuple["BatchCache", Tensor | None]], length: int) -> "BatchCache":
        """A cache of rows taken from others.

        Args:
            parts: (cache, int64 row numbers or None for all its rows).
            length: columns to keep, counted from the newest.
        """
        merged = BatchCache(len(parts[0][0].batch_layers))
        for number, layer in enumerate(merged.batch_layers):
            layer.assemble([(cache.batch_layers[number], rows) for cache, rows in parts], length)
        return merged


def left_padded(rows: list[list[int]], fill: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and position ids of rows aligned at their ends, each int64 [B, L]."""
    length = max(map(len, rows))
    ids_BL = torch.tensor([[fill] * (length - len(row)) + row for row in rows])
    size_B1 = torch.tensor([[len(row)] for row in rows])
    position_BL = torch.arange(length) - (length - size_B1)
    return ids_BL, (position_BL >= 0).long(), position_BL.clamp_min_(0)
