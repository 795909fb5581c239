"""Process groups as plain data: injected everywhere, built once (for Megatron-Core by ``mcore``)."""

from dataclasses import dataclass

import torch.distributed as dist


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
