"""Core attention on packed sequences without Transformer Engine, with zigzag context parallelism.

Axis suffixes: T local tokens, G tokens of all context-parallel ranks, A heads, D head dimension.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from asympo_megatron.errors import ConfigError
from asympo_megatron.mcore.packed import Bucket, PackedSequences, PaddedLayout

SHORT = 64
"""Up to this length a batch of small matrix products beats the flash kernel on CPU (half the time at 25 tokens)."""


class PackedAttention(MegatronModule):
    """Causal softmax attention inside each packed sequence.

    Under context parallelism keys and values of all ranks are gathered (their gradients are reduce-scattered), and
    each rank attends from its two zigzag chunks. Exact, simple, and meant for machines without Transformer Engine.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout:
            raise ConfigError(
                f"model.megatron.attention_dropout={dropout} needs Transformer Engine on a GPU. Set it to 0."
            )
        self._scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)
        self._context = pg_collection.cp if pg_collection is not None else None

    def forward(
        self,
        query_TAD: Tensor,
        key_TAD: Tensor,
        value_TAD: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> Tensor:
        """[T, heads, D] queries and [T, KV heads, D] keys and values -> [T, heads x D].

        Raises:
            TypeError: called without :class:`PackedSequences`; this package always packs.
        """
        if not isinstance(packed_seq_params, PackedSequences) or attention_bias is not None:
            raise TypeError("PackedAttention needs packed_seq_params=PackedSequences.of(...) and no attention_bias.")
        if packed_seq_params.context_size > 1:
            return self._across_ranks(query_TAD, key_TAD, value_TAD, packed_seq_params).flatten(1)
        layout = packed_seq_params.query_layout
        query, key, value = (_pad(x, layout) for x in (query_TAD, key_TAD, value_TAD))
        outputs = []
        start = 0
        for bucket in layout.buckets:
            q, k, v = (_rows(x, start, bucket) for x in (query, key, value))
            # Padding stands behind the tokens of its row, where causal attention never looks.
            if q.is_cpu and bucket.length <= SHORT and q.dtype in (torch.float32, torch.float64):
                out = _ShortAttention.apply(q, k, v, self._scale)
            else:
                out = F.scaled_dot_product_attention(
                    q, k, v, is_causal=True, scale=self._scale, enable_gqa=q.shape[1] != k.shape[1]
                )
            outputs.append(out.transpose(1, 2).flatten(0, 1))
            start += bucket.slots
        return _unpad(torch.cat(outputs), layout).flatten(1)

    def _across_ranks(self, query_TAD: Tensor, key_TAD: Tensor, value_TAD: Tensor, packed: PackedSequences) -> Tensor:
        key_GAD, value_GAD = _AllGather.apply(torch.stack([key_TAD, value_TAD], 1), self._context).unbind(1)
        queries, keys = packed.query_layout, packed.key_layout
        query, key, value = _pad(query_TAD, queries), _pad(key_GAD, keys), _pad(value_GAD, keys)
        outputs = []
        query_start = key_start = 0
        for query_bucket, key_bucket, visible in zip(queries.buckets, keys.buckets, packed.visible, strict=True):
            q = _rows(query, query_start, query_bucket)
            k, v = _rows(key, key_start, key_bucket), _rows(value, key_start, key_bucket)
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=visible, scale=self._scale, enable_gqa=q.shape[1] != k.shape[1]
            )
            outputs.append(out.transpose(1, 2).flatten(0, 1))
            query_start += query_bucket.slots
            key_start += key_bucket.slots
        return _unpad(torch.cat(outputs), queries)


def _rows(x: Tensor, start: int, bucket: Bucket) -> Tensor:
    """[slots, A, D] -> [rows, A, length, D]."""
    return x[start : start + bucket.slots].unflatten(0, (bucket.rows, bucket.length)).transpose(1, 2)


def _pad(x_TAD: Tensor, layout: PaddedLayout) -> Tensor:
    return x_TAD if layout.slot_T is None else _Scatter.apply(x_TAD, layout.slot_T, layout.num_slots)


def _unpad(x: Tensor, layout: PaddedLayout) -> Tensor:
    return x if layout.slot_T is None else _Gather.apply(x, layout.slot_T)


class _Scatter(torch.autograd.Function):
    """Tokens to their slots. Every slot is used at most once, so the backward is a plain gather, not an index_add."""

    @staticmethod
    def forward(ctx: Any, x_TAD: Tensor, slot_T: Tensor, num_slots: int) -> Tensor:
        ctx.save_for_backward(slot_T)
        return _place(x_TAD, slot_T, num_slots)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (slot_T,) = ctx.saved_tensors
        return grad.index_select(0, slot_T), None, None


class _Gather(torch.autograd.Function):
    """Slots back to tokens, the inverse of :class:`_Scatter`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slot_T: Tensor) -> Tensor:
        ctx.save_for_backward(slot_T)
        ctx.num_slots = x.shape[0]
        return x.index_select(0, slot_T)

    @staticmethod
    def backward(ctx: Any, grad_TAD: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (slot_T,) = ctx.saved_tensors
        return _place(grad_TAD, slot_T, ctx.num_slots), None


def _place(x_TAD: Tensor, slot_T: Tensor, num_slots: int) -> Tensor:
    return x_TAD.new_zeros((num_slots, *x_TAD.shape[1:])).index_copy_(0, slot_T, x_TAD)


class _ShortAttention(torch.autograd.Function):
    """Causal attention of many short rows on CPU: scores of all rows and heads in a few batched products."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        rows, heads, length, dim = query.shape
        groups = rows * key.shape[1]
        # The query heads of one key stand below each other: one product serves all of them.
        q = query.reshape(groups, -1, dim)
        k, v = key.reshape(groups, length, dim), value.reshape(groups, length, dim)
        future = torch.full((length, length), -math.inf, dtype=q.dtype).triu(1)
        mask = future.repeat(heads // key.shape[1], 1).expand(groups, -1, -1)
        weights = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scale).softmax(-1)
        ctx.save_for_backward(q, k, v, weights)
        ctx.scale, ctx.query_shape, ctx.key_shape = scale, query.shape, key.shape
        return (weights @ v).view(query.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        q, k, v, weights = ctx.saved_tensors
        grad = grad.reshape(q.shape)
        grad_weights = grad @ v.transpose(1, 2)
        along = (grad_weights * weights).sum(-1, keepdim=True)
        grad_scores = grad_weights.sub_(along).mul_(weights).mul_(ctx.scale)
        return (
            (grad_scores @ k).view(ctx.query_shape),
            (grad_scores.transpose(1, 2) @ q).view(ctx.key_shape),
            (weights.transpose(1, 2) @ grad).view(ctx.key_shape),
            None,
        )


class _AllGather(torch.autograd.Function):
    """Concatenate over ranks in forward; sum over ranks and keep the own share in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = x.new_empty((x.shape[0] * group.size(), *x.shape[1:]))
        dist.all_gather_into_tensor(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        share = grad.new_empty((grad.shape[0] // ctx.group.size(), *grad.shape[1:]))
        dist.reduce_scatter_tensor(share, grad.contiguous(), group=ctx.group)
        return share, None
