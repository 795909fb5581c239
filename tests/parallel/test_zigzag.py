"""The zigzag split: literal maps, its inverse, equal causal work."""

import pytest
import torch

from asympo_megatron.errors import BatchError
from asympo_megatron.parallel import merge_context, split_context, zigzag_index


@pytest.mark.parametrize(
    ("starts", "size", "rank", "index"),
    [
        ([0, 8], 2, 0, [0, 1, 6, 7]),
        ([0, 8], 2, 1, [2, 3, 4, 5]),
        ([0, 4, 12], 2, 0, [0, 3, 4, 5, 10, 11]),
        ([0, 4, 12], 2, 1, [1, 2, 6, 7, 8, 9]),
        ([0, 6], 3, 1, [1, 4]),
        ([0, 8, 8, 16], 4, 3, [3, 4, 11, 12]),
        ([0, 3, 5], 1, 0, [0, 1, 2, 3, 4]),
        ([0], 2, 1, []),
    ],
)
def test_literal_maps(starts, size, rank, index):
    got = zigzag_index(torch.tensor(starts, dtype=torch.int32), size, rank)
    assert got.dtype == torch.int64
    assert got.tolist() == index


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_merge_is_the_inverse_of_split(size):
    starts = torch.tensor([0, 24, 24, 72, 96])
    packed = torch.randn(96, 2, generator=torch.Generator().manual_seed(0))
    local = [split_context(packed, starts, size, rank) for rank in range(size)]
    assert all(len(part) == 96 // size for part in local)
    assert torch.equal(merge_context(local, starts), packed)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_have_equal_causal_work(size):
    work = [int((zigzag_index(torch.tensor([0, 32]), size, rank) + 1).sum()) for rank in range(size)]
    assert work == [32 * 33 // 2 // size] * size
    contiguous = [int(part.sum()) for part in (torch.arange(32) + 1).chunk(size)]
    assert contiguous != work  # the mutant: ranks of a contiguous split wait for the last one


def test_local_starts_are_starts_over_size():
    """Sequence s of rank r occupies [starts[s] / CP, starts[s + 1] / CP) of the local tokens."""
    starts = torch.tensor([0, 8, 24, 32])
    owner = torch.repeat_interleave(torch.arange(3), starts.diff())
    for rank in range(4):
        local = split_context(owner, starts, 4, rank)
        assert torch.equal(local, torch.repeat_interleave(torch.arange(3), (starts // 4).diff()))


def test_uneven_length_is_refused():
    with pytest.raises(
        BatchError, match=r"packed sequence 1 has 6 tokens, no multiple of 2 x CP = 4. Pad .* multiple of 4\."
    ):
        zigzag_index(torch.tensor([0, 8, 14]), 2, 0)
