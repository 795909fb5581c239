"""RMSNorm for Megatron's local layers: marked for sequence parallelism, and fast on CPU."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, over the last axis.

    The weight says that its gradient must be summed over tensor parallelism under sequence parallelism:
    ``finalize_model_grads._allreduce_non_tensor_model_parallel_grads`` looks for that mark, and Megatron's own wrapper
    of torch's norms refuses sequence parallelism instead of setting it.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cpu and x.dtype in (torch.float32, torch.float64):
            normed: Tensor = _CpuRMSNorm.apply(x, self.weight, self.eps)
            return normed
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class _CpuRMSNorm(torch.autograd.Function):
    """torch composes this norm of a dozen operations on CPU, each a pass over memory; here it is a third of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse = mean_square.add_(eps).rsqrt_()
        normed = x * inverse
        ctx.save_for_backward(normed, weight, inverse)
        return normed * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        normed, weight, inverse = ctx.saved_tensors
        product = grad * normed
        along = (product @ weight).unsqueeze(-1).div_(-normed.shape[-1])
        grad_x = torch.addcmul(grad * weight, normed, along).mul_(inverse)
        return grad_x, product.flatten(0, -2).sum(0), None
