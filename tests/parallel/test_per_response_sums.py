"""Sums per response and the way back to tokens."""

import math

import torch

from asympo_megatron.parallel import spread_to_tokens, sum_per_response
from asympo_megatron.testing.distributed import run_threads

IDS_T = torch.tensor([2, -1, 0, 0, 2, -1])
VALUES_T = torch.tensor([1.0, math.nan, 2.0, 3.0, 4.0, math.inf], dtype=torch.float64)


def test_sum_ignores_untrained_tokens():
    assert sum_per_response(VALUES_T, IDS_T, 3).tolist() == [5.0, 0.0, 5.0]


def test_several_columns_at_once():
    columns = torch.stack([VALUES_T, 10 * VALUES_T], dim=1)
    assert sum_per_response(columns, IDS_T, 3).tolist() == [[5.0, 50.0], [0.0, 0.0], [5.0, 50.0]]


def test_no_response_and_no_token():
    assert sum_per_response(VALUES_T[:0], IDS_T[:0], 0).tolist() == []
    assert sum_per_response(VALUES_T[:0], IDS_T[:0], 2).tolist() == [0.0, 0.0]
    assert sum_per_response(VALUES_T[1:2], IDS_T[1:2], 0).tolist() == []
    assert spread_to_tokens(torch.zeros(0), torch.tensor([-1, -1])).tolist() == [0.0, 0.0]


def test_spread_gives_untrained_tokens_exactly_zero():
    value_R = torch.tensor([1.0, math.inf, math.nan])
    assert spread_to_tokens(value_R, torch.tensor([-1, 0, 1, -1])).tolist() == [0.0, 1.0, math.inf, 0.0]


def test_dtypes_are_at_least_float32():
    ones = torch.ones(3, dtype=torch.bfloat16)
    ids = torch.zeros(3, dtype=torch.long)
    assert sum_per_response(ones, ids, 1).dtype == torch.float32
    assert sum_per_response(ones.double(), ids, 1).dtype == torch.float64


def test_result_is_detached():
    assert not sum_per_response(torch.ones(1, requires_grad=True), torch.tensor([0]), 1).requires_grad


def sum_rank(group):
    part = slice(3 * group.rank(), 3 * group.rank() + 3)
    return sum_per_response(VALUES_T[part], IDS_T[part], 3, group).tolist()


def test_sum_over_context_ranks():
    """Responses 0 and 2 lie on both ranks."""
    assert run_threads(sum_rank, 2) == [[5.0, 0.0, 5.0]] * 2
