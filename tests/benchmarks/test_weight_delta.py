"""The benchmark of deltas: its settled masters round to the published weights, and are not these."""

import torch
from weight_delta import settled


def test_settled_masters_lie_anywhere_in_the_rounding_intervals_of_the_weights() -> None:
    torch.manual_seed(0)
    weights = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16)
    weights = weights[weights.isfinite() & (weights.abs() < 1e38)]  # every number of bf16 but the largest
    masters = settled(weights)
    nonzero = weights != 0
    assert torch.equal(masters.bfloat16()[nonzero].view(torch.int16), weights[nonzero].view(torch.int16))
    assert torch.equal(masters[~nonzero], torch.zeros(2))
    spread = (masters.view(torch.int32) - weights.float().view(torch.int32))[nonzero].double()
    assert abs(spread.mean()) < 300  # of 65,535; the deviation of the mean is 74
    assert abs(spread.std() / 2**16 - 12**-0.5) < 0.003  # uniform
