"""Packed sequences and where their tokens go when attention runs on a padded batch.

Axis suffixes: S packed sequences, T local tokens of this rank, G tokens of all context-parallel ranks.

Short sequences are attended to as one padded batch: a Python loop over hundreds of sequences of some 20 tokens would
cost more than the attention. Sequences of similar length share a bucket, so little of the batch is padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from asympo_megatron.parallel import zigzag_index

FILL = 0.75
"""A sequence joins a bucket if it fills at least this much of the bucket's longest: at most a third is padding."""

MAX_BUCKET_SCORES = 1 << 22
"""Scores (sequences x length^2) of one padded batch; beyond it a batch gains nothing and costs memory."""


@dataclass(frozen=True)
class Bucket:
    """Sequences attended to in one call, as rows [first, first + rows x length) of the padded layout."""

    rows: int
    length: int

    @property
    def slots(self) -> int:
        return self.rows * self.length


@dataclass(frozen=True)
class PaddedLayout:
    """Buckets, and the slot of every packed token in them; ``slot`` is None if packed and padded are the same."""

    buckets: tuple[Bucket, ...]
    slot_T: Tensor | None
    num_slots: int


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's PackedSeqParams plus the lengths as plain integers and the padded layouts, computed once.

    Every attention layer of every stage reuses them; reading lengths back from a tensor would synchronise a GPU.
    """

    lengths_S: tuple[int, ...] = ()
    """Padded length of each sequence over all context-parallel ranks."""
    context_size: int = 1
    context_rank: int = 0

    @classmethod
    def of(
        cls, lengths_S: Sequence[int], device: torch.device, context_size: int = 1, context_rank: int = 0
    ) -> "PackedSequences":
        """Describe sequences of these padded lengths (multiples of 2 x ``context_size`` if that exceeds 1)."""
        cu_seqlens = torch.tensor([0, *lengths_S], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
        # Longest sequence, never the total: a rotary table with as many rows as the pack has tokens makes
        # rope_utils._apply_rotary_pos_emb_thd count positions through the pack instead of per sequence.
        longest = max(lengths_S)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            cu_seqlens_q_padded=cu_seqlens,
            cu_seqlens_kv_padded=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            lengths_S=tuple(lengths_S),
            context_size=context_size,
            context_rank=context_rank,
        )

    @cached_property
    def query_layout(self) -> PaddedLayout:
        """Where the tokens of this rank go."""
        return _padded(self._order, [length // self.context_size for length in self.lengths_S], self._device)

    @cached_property
    def key_layout(self) -> PaddedLayout:
        """Where the all-gathered tokens (rank after rank, zigzag chunks) go, in natural order inside a sequence."""
        layout = _padded(self._order, list(self.lengths_S), self._device)
        natural = layout.slot_T
        if natural is None:
            natural = torch.arange(sum(self.lengths_S), device=self._device)
        per_rank = [self.index_of(rank) for rank in range(self.context_size)]
        return PaddedLayout(layout.buckets, natural[torch.cat(per_rank)], layout.num_slots)

    @cached_property
    def visible(self) -> tuple[Tensor, ...]:
        """Per bucket bool [rows, 1, local length, whole length]: the keys each query of this rank may look at."""
        masks = []
        local = self.positions
        queries, keys = self.query_layout, self.key_layout
        position = torch.zeros(queries.num_slots, dtype=torch.int64, device=self._device)
        position = local if queries.slot_T is None else position.index_copy(0, queries.slot_T, local)
        start = 0
        for query_bucket, key_bucket in zip(queries.buckets, keys.buckets, strict=True):
            rows = position[start : start + query_bucket.slots].view(query_bucket.rows, 1, query_bucket.length, 1)
            masks.append(rows >= torch.arange(key_bucket.length, device=self._device))
            start += query_bucket.slots
        return tuple(masks)

    @cached_property
    def positions(self) -> Tensor:
        """int64 [T]: position inside its sequence of every token of this rank."""
        start_S = torch.tensor([0, *self.lengths_S], device=self._device).cumsum(0)[:-1]
        local_S = torch.tensor(self.lengths_S, device=self._device) // self.context_size
        return self.index_of(self.context_rank) - start_S.repeat_interleave(local_S)

    def index_of(self, context_rank: int) -> Tensor:
        """int64 [T]: the tokens of a context-parallel rank in the pack of whole sequences."""
        return zigzag_index(self.cu_seqlens_q, self.context_size, context_rank)

    @property
    def _device(self) -> torch.device:
        return self.cu_seqlens_q.device

    @cached_property
    def _order(self) -> tuple[tuple[int, ...], ...]:
        """Sequence numbers of each bucket. All-equal lengths keep their order, so that no token has to move."""
        buckets: list[list[int]] = []
        for number in sorted(range(len(self.lengths_S)), key=lambda s: -self.lengths_S[s]):
            longest = self.lengths_S[buckets[-1][0]] if buckets else 0
            room = buckets and (len(buckets[-1]) + 1) * longest * longest <= MAX_BUCKET_SCORES
            if room and self.lengths_S[number] >= FILL * longest:
                buckets[-1].append(number)
            else:
                buckets.append([number])
        return tuple(map(tuple, buckets))


def _padded(order: tuple[tuple[int, ...], ...], lengths_S: list[int], device: torch.device) -> PaddedLayout:
    buckets, first_slot_S = [], [0] * len(lengths_S)
    slots = 0
    for members in order:
        length = max(lengths_S[s] for s in members)
        buckets.append(Bucket(len(members), length))
        for s in members:
            first_slot_S[s] = slots
            slots += length
    total = sum(lengths_S)
    if slots == total and order == (tuple(range(len(lengths_S))),):
        return PaddedLayout(tuple(buckets), None, slots)
    length_S = torch.tensor(lengths_S)
    start_S = torch.cat([length_S.new_zeros(1), length_S.cumsum(0)[:-1]])
    slot_T = torch.arange(total) + (torch.tensor(first_slot_S) - start_S).repeat_interleave(length_S)
    return PaddedLayout(tuple(buckets), slot_T.to(device), slots)
