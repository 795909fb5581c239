"""Process groups as plain data: injected everywhere, built once (for Megatron-Core by ``mcore``)."""

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class ParallelGroups:
    """The process groups that objectives and reductions use; None stands for a group of one rank.

    Args:
        tensor: ranks that share one vocabulary (TP).
        context: ranks that share one response (CP).
        data_context: DP x CP: every rank that holds different tokens of the global batch.
        pipeline: stages of one model replica (PP).
    """

    tensor: dist.ProcessGroup | None = None
    context: dist.ProcessGroup | None = None
    data_context: dist.ProcessGroup | None = None
    pipeline: dist.ProcessGroup | None = None

    @classmethod
    def single(cls) -> "ParallelGroups":
        """One rank: no collective is ever called."""
        return cls()

    @property
    def tensor_size(self) -> int:
        return 1 if self.tensor is None else self.tensor.size()

    @property
    def tensor_rank(self) -> int:
        return 0 if self.tensor is None else self.tensor.rank()

    @property
    def context_size(self) -> int:
        return 1 if self.context is None else self.context.size()

    @property
    def context_rank(self) -> int:
        return 0 if self.context is None else self.context.rank()


SINGLE = ParallelGroups.single()
"""The groups of one rank, as a default argument."""


def sum_over(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum ``tensor`` over the ranks of ``group``, in place; nothing happens for None."""
    return _all_reduce(tensor, dist.ReduceOp.SUM, group)


def max_over(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Take the maximum of ``tensor`` over the ranks of ``group``, in place; nothing happens for None."""
    return _all_reduce(tensor, dist.ReduceOp.MAX, group)


def _all_reduce(tensor: Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None) -> Tensor:
    # Every rank of the group holds the same shape, so all of them skip an empty tensor together.
    if group is not None and tensor.numel():
        dist.all_reduce(tensor, op=op, group=group)
    return tensor
