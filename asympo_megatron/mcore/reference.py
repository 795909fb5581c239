"""The reference policy: a second, frozen set of this rank's parameters."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class ReferenceWeights:
    """Copies of parameters in CPU memory, put into the model for a scoring pass and taken out again.

    The copies are of the parameters of this rank, so nothing is gathered or resharded. Optimizer states and float32
    masters are never touched: a step before or after the pass does not know of it.

    Args:
        params: the parameters to copy, in an order that stays the same.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._held = [param.detach().to("cpu", copy=True) for param in params]

    @contextmanager
    def in_place_of(self, params: Sequence[Tensor]) -> Iterator[None]:
        """Let ``params`` hold the reference weights inside the block; they have their own values, bit for bit, after
        it, also when it raises."""
        with restored(params):
            _write(params, self._held)
            yield


@contextmanager
def restored(params: Sequence[Tensor]) -> Iterator[None]:
    """Put the values that ``params`` have now back at the end of the block."""
    own = [param.detach().clone() for param in params]
    try:
        yield
    finally:
        _write(params, own)


@torch.no_grad()
def _write(params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for param, value in zip(params, values, strict=True):
        param.copy_(value)
