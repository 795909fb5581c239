"""largest_bound: hand values, a plain search, and the same answer however the values are spread over ranks."""

import math

import pytest
import torch

from asympo_megatron.parallel import largest_bound
from asympo_megatron.testing.distributed import run_threads


def by_trial(values, limit):
    """The largest value that may stay, by trying each: the bound is at least that, and below the next larger one."""
    kept = [c for c in values if math.fsum(x for x in values if x <= c) <= limit * sum(x <= c for x in values)]
    low = max(kept, default=0.0)
    return low, min((x for x in values if x > low), default=math.inf)


@pytest.mark.parametrize(
    ("values", "limit", "kept"),
    [
        ([1.0, 2.0, 3.0], 2.0, [1.0, 2.0, 3.0]),
        ([1.0, 2.0, 3.0], 1.9, [1.0, 2.0]),
        ([1.0, 3.0, 3.0], 2.0, [1.0]),  # ties stay together
        ([5.0, 6.0], 4.0, []),
        ([0.0, 0.0, 9.0], 0.0, [0.0, 0.0]),
        ([], 1.0, []),
    ],
)
def test_hand_values(values, limit, kept):
    values = torch.tensor(values, dtype=torch.float64)
    bound = largest_bound(values, limit)
    assert bound.dtype == torch.float64
    assert values[values <= bound].tolist() == kept
    assert not bound.isnan()


def test_everything_may_stay():
    assert largest_bound(torch.tensor([1.0, 2.0]), 5.0).item() == math.inf


@pytest.mark.parametrize("seed", range(5))
def test_against_a_plain_search(seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(200, generator=generator, dtype=torch.float64) ** 6 * 10 ** (seed - 3)
    limit = float(values.mean()) / 3
    low, high = by_trial(values.tolist(), limit)
    bound = largest_bound(values, limit).item()
    assert low <= bound < high


def _on_ranks(group, parts, limit):
    return largest_bound(parts[group.rank()], limit, group).item()


def test_ranks_agree_with_one():
    values = torch.rand(101, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    want = largest_bound(values, 0.3).item()
    for parts in (list(values.tensor_split(4)), [values[:0], values, values[:0], values[:0]]):
        assert run_threads(_on_ranks, 4, parts, 0.3) == [want] * 4
    own = largest_bound(values.tensor_split(4)[0], 0.3).item()
    assert own != want  # what a rank finds alone is another bound
