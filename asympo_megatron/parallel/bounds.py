"""A bound on the values of all ranks, found without gathering them."""

import torch
import torch.distributed as dist
from torch import Tensor

from asympo_megatron.parallel.groups import sum_over

_DIGIT_BITS = 7
_SHIFTS = range(56, -1, -_DIGIT_BITS)
"""63 bits of a non-negative float64, in digits of 7."""


def largest_bound(values: Tensor, limit: float, group: dist.ProcessGroup | None = None) -> Tensor:
    """The largest c for which the mean of all values <= c, over all ranks, is at most ``limit``.

    Non-negative floats are ordered as their bits are, so c is found digit by digit: nine all-reduces of 2 KiB,
    whatever the number of values, and the same c for any distribution of the values over ranks.

    Args:
        values: [n] non-negative; n may be 0 and differ between ranks.
        limit: at least 0.
        group: every rank of it must call; None for one rank.

    Returns:
        0-d float64, equal on every rank; infinite if all values may stay.
    """
    sorted_n = values.double().sort().values
    sums_n = torch.cat([sorted_n.new_zeros(1), sorted_n.cumsum(0)])
    digits = torch.arange(2**_DIGIT_BITS, device=values.device)
    bits = digits.new_zeros(())
    for shift in _SHIFTS:
        candidates = bits + (digits << shift)
        # Bits above those of infinity are no numbers; they stand for infinity, too.
        bounds = candidates.clamp(max=_INFINITY_BITS).view(torch.float64)
        counts = torch.searchsorted(sorted_n, bounds, right=True)
        totals = sum_over(torch.stack([sums_n[counts], counts.double()]), group)
        # True up to the digit that is sought and false from there on: prefix means only grow.
        holds = totals[0] <= limit * totals[1]
        bits = candidates[holds.sum() - 1]
    return bits.clamp(max=_INFINITY_BITS).view(torch.float64)


_INFINITY_BITS = 0x7FF0000000000000
