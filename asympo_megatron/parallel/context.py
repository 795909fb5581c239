"""Zigzag split of packed sequences over context parallelism: index maps, no communication.

Every sequence is cut into 2 x CP equal pieces; rank r holds pieces r and 2 CP - 1 - r, so that all ranks have the same
causal-attention work:

    CP = 2, one sequence of 8:   rank 0 holds 0 1 6 7      rank 1 holds 2 3 4 5

Axis suffixes: T tokens of all ranks in natural packed order, L tokens of one rank, S sequences.
"""

import torch
from torch import Tensor

from asympo_megatron.errors import BatchError


def zigzag_index(cu_seqlens: Tensor, context_size: int, context_rank: int) -> Tensor:
    """Positions in the natural packed order that one rank holds, in the order in which it holds them.

    Args:
        cu_seqlens: int [S + 1], starts of the packed sequences and the total length. Lengths include padding.
        context_size: CP.
        context_rank: rank inside the context-parallel group.

    Returns:
        int64 [L] with L = T / CP, so that ``local = packed[index]``. The rank's own starts are ``cu_seqlens // CP``.

    Raises:
        BatchError: a length is no multiple of 2 x CP (for CP 1 every length will do).
    """
    cu_seqlens = cu_seqlens.long()
    if context_size == 1:
        return torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
    length_S = cu_seqlens.diff()
    piece_S = length_S // (2 * context_size)
    odd = (piece_S * 2 * context_size != length_S).nonzero()
    if odd.numel():
        row = int(odd[0])
        raise BatchError(
            f"packed sequence {row} has {int(length_S[row])} tokens, no multiple of 2 x CP = {2 * context_size}. "
            f"Pad every sequence to a multiple of {2 * context_size}."
        )
    local_start_S = torch.repeat_interleave(cu_seqlens[:-1] // context_size, 2 * piece_S)
    start_L = torch.repeat_interleave(cu_seqlens[:-1], 2 * piece_S)
    piece_L = torch.repeat_interleave(piece_S, 2 * piece_S)
    offset_L = torch.arange(start_L.numel(), device=cu_seqlens.device) - local_start_S
    # The first local half is piece r, the second is piece 2 CP - 1 - r.
    skip_L = torch.where(offset_L < piece_L, context_rank, 2 * context_size - 2 - context_rank) * piece_L
    return start_L + skip_L + offset_L


def split_context(packed_T: Tensor, cu_seqlens: Tensor, context_size: int, context_rank: int) -> Tensor:
    """The tokens (or rows) of one rank, of a tensor in natural packed order along its first axis."""
    return packed_T[zigzag_index(cu_seqlens, context_size, context_rank).to(packed_T.device)]


def merge_context(local_per_rank: list[Tensor], cu_seqlens: Tensor) -> Tensor:
    """Natural packed order from the local tensors of all ranks, in rank order: the inverse of the split."""
    context_size = len(local_per_rank)
    index = torch.cat([zigzag_index(cu_seqlens, context_size, rank) for rank in range(context_size)])
    joined = torch.cat(local_per_rank)
    merged = torch.empty_like(joined)
    merged[index.to(joined.device)] = joined
    return merged
