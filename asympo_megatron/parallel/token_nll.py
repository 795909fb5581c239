"""Linear output layer and token NLL in one, without ever holding the [T, V] logits.

Axis suffixes: T local packed tokens, C tokens of one chunk, H hidden, V rows of the local vocabulary shard.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from asympo_megatron.errors import BatchError
from asympo_megatron.parallel.groups import SINGLE, ParallelGroups, max_over, sum_over

CHUNK_BYTES = 256 * 2**20
"""Default size of one chunk of float32 logits; two such buffers live at a time."""

_FAR_BELOW = -1e4
"""exp of it is 0 in every dtype, and unlike -inf it can be multiplied by 0."""


@overload
def token_nll(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    target_T: Tensor,
    *,
    temperature: float = ...,
    groups: ParallelGroups = ...,
    with_entropy: Literal[False] = ...,
    vocab_size: int | None = ...,
    chunk_tokens: int | None = ...,
    sum_hidden_grad: bool = ...,
) -> Tensor: ...
@overload
def token_nll(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    target_T: Tensor,
    *,
    temperature: float = ...,
    groups: ParallelGroups = ...,
    with_entropy: Literal[True],
    vocab_size: int | None = ...,
    chunk_tokens: int | None = ...,
    sum_hidden_grad: bool = ...,
) -> tuple[Tensor, Tensor]: ...
def token_nll(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    target_T: Tensor,
    *,
    temperature: float = 1.0,
    groups: ParallelGroups = SINGLE,
    with_entropy: bool = False,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
    sum_hidden_grad: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Negative log-probability of each target under softmax(hidden weight^T / temperature).

        nll_t = log sum_v exp(z_tv) - z_t,target      entropy_t = - sum_v p_tv log p_tv

    Logits are made chunk by chunk and made again in backward (a fourth GEMM). Over a tensor-parallel group the call
    costs one MAX of [T] and one SUM of [2, T] ([3, T] with entropy), however many chunks; backward none for logits.

    Args:
        hidden_TH: [T, H] float, replicated over ``groups.tensor`` (sequence parallelism gathered before).
        weight_VH: [V, H], the same dtype: this rank's contiguous vocabulary shard, equally large on every rank.
        target_T: int64 [T], ids of the whole vocabulary. Where a token is untrained any id may stand.
        temperature: logits are divided by it: score at the temperature that sampled.
        groups: only ``groups.tensor`` is used.
        with_entropy: also return the entropy [T]; it carries gradient if it is used in the loss.
        vocab_size: true vocabulary; rows of padding behind it get probability 0 and gradient 0. None: no padding.
        chunk_tokens: tokens of one chunk; None: as many as ``CHUNK_BYTES`` hold.
        sum_hidden_grad: False: the gradient of ``hidden_TH`` is this vocabulary shard's part, as behind Megatron's
            ColumnParallelLinear, whose input copy (or sequence-parallel gather) sums it in its own backward.
            True: summed over ``groups.tensor`` here, for a caller whose hidden states have no such copy.

    Returns:
        nll_T [T], or (nll_T, entropy_T), in max(float32, dtype of hidden), equal on all ranks of ``groups.tensor``.
        The gradient of the weight accumulates in the same dtype and is cast to the weight's once.

    Raises:
        BatchError: shapes, dtypes, temperature or chunk size that cannot work.
    """
    _check(hidden_TH, weight_VH, target_T, temperature, chunk_tokens)
    shard = weight_VH.shape[0]
    first_id = groups.tensor_rank * shard
    real_rows = shard if vocab_size is None else min(max(vocab_size - first_id, 0), shard)
    plan = _Plan(
        inverse_temperature=1.0 / temperature,
        chunk_tokens=chunk_tokens or max(1, CHUNK_BYTES // (4 * max(shard, 1))),
        first_id=first_id,
        real_rows=real_rows,
        tensor=groups.tensor,
        with_entropy=with_entropy,
        sum_hidden_grad=sum_hidden_grad,
    )
    nll_T, entropy_T = _LinearTokenNLL.apply(hidden_TH, weight_VH, target_T, plan)
    return (nll_T, entropy_T) if with_entropy else nll_T


@dataclass(frozen=True)
class _Plan:
    inverse_temperature: float
    chunk_tokens: int
    first_id: int
    real_rows: int
    tensor: dist.ProcessGroup | None
    with_entropy: bool
    sum_hidden_grad: bool

    def chunks(self, tokens: int) -> Iterator[slice]:
        """Chunks of tokens; none at all where the whole shard is padding."""
        if self.real_rows:
            for start in range(0, tokens, self.chunk_tokens):
                yield slice(start, min(tokens, start + self.chunk_tokens))

    def local_target(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Which targets lie in this shard, and their local rows (0 for the others)."""
        owned = (target >= self.first_id) & (target < self.first_id + self.real_rows)
        return owned, torch.where(owned, target - self.first_id, 0)

    def logits(self, hidden_CH: Tensor, weight_VH: Tensor) -> Tensor:
        """A fresh [C, V] buffer that the caller may overwrite."""
        logits_CV = hidden_CH @ weight_VH[: self.real_rows].t()
        wide = logits_CV.to(_wide(hidden_CH.dtype))
        return wide if self.inverse_temperature == 1.0 else wide.mul_(self.inverse_temperature)


class _LinearTokenNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, target_T: Tensor, plan: _Plan) -> tuple[Tensor, Tensor]:
        top_T, sum_T, target_logit_T, shifted_T = _shard_statistics(hidden_TH, weight_VH, target_T, plan)
        local_top_T = top_T.clone()
        max_over(top_T, plan.tensor)
        shift_T = (local_top_T - top_T).clamp(min=_FAR_BELOW)
        owned_T, _ = plan.local_target(target_T)
        rows = [sum_T * shift_T.exp(), torch.where(owned_T, target_logit_T - top_T, 0.0)]
        if plan.with_entropy:
            rows.append((shifted_T + sum_T * shift_T) * shift_T.exp())
        packed = sum_over(torch.stack(rows), plan.tensor)
        log_sum_T = packed[0].log()
        nll_T = log_sum_T - packed[1]
        entropy_T = log_sum_T - packed[2] / packed[0] if plan.with_entropy else nll_T.new_zeros(0)
        ctx.save_for_backward(hidden_TH, weight_VH, target_T, top_T + log_sum_T, entropy_T)
        ctx.plan = plan
        ctx.set_materialize_grads(False)  # an entropy that is only logged costs nothing in backward
        return nll_T, entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_nll_T: Tensor | None, grad_entropy_T: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_TH, weight_VH, target_T, log_sum_exp_T, entropy_T = ctx.saved_tensors
        plan: _Plan = ctx.plan
        grad_hidden = torch.zeros_like(hidden_TH) if ctx.needs_input_grad[0] else None
        wide = _wide(weight_VH.dtype)
        grad_weight = torch.zeros_like(weight_VH, dtype=wide) if ctx.needs_input_grad[1] else None
        if grad_nll_T is None:
            grad_nll_T = torch.zeros_like(log_sum_exp_T)
        for part in plan.chunks(hidden_TH.shape[0]):
            log_prob_CV = plan.logits(hidden_TH[part], weight_VH).sub_(log_sum_exp_T[part, None])
            owned_C, row_C = plan.local_target(target_T[part])
            if grad_entropy_T is None:
                grad_CV = log_prob_CV.exp_().mul_(grad_nll_T[part, None])
            else:  # d entropy / d z_v = - p_v (log p_v + entropy)
                grad_CV = log_prob_CV.exp()
                log_prob_CV.add_(entropy_T[part, None]).mul_(-grad_entropy_T[part, None])
                grad_CV.mul_(log_prob_CV.add_(grad_nll_T[part, None]))
            grad_CV.scatter_add_(1, row_C[:, None], torch.where(owned_C, -grad_nll_T[part], 0.0)[:, None])
            grad_CV = grad_CV.mul_(plan.inverse_temperature).to(hidden_TH.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad_CV @ weight_VH[: plan.real_rows]
            if grad_weight is not None:
                _add_product(grad_weight[: plan.real_rows], grad_CV, hidden_TH[part])
        if grad_hidden is not None and plan.sum_hidden_grad:
            sum_over(grad_hidden, plan.tensor)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight_VH.dtype), None, None


def _shard_statistics(
    hidden_TH: Tensor, weight_VH: Tensor, target_T: Tensor, plan: _Plan
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per token over the local shard: max z, sum exp(z - max), z of the target, sum exp(z - max) (z - max)."""
    tokens = hidden_TH.shape[0]
    top_T = hidden_TH.new_full((tokens,), -torch.inf, dtype=_wide(hidden_TH.dtype))
    sum_T, target_T_logit, shifted_T = (torch.zeros_like(top_T) for _ in range(3))
    for part in plan.chunks(tokens):
        logits_CV = plan.logits(hidden_TH[part], weight_VH)
        _, row_C = plan.local_target(target_T[part])
        target_T_logit[part] = logits_CV.gather(1, row_C[:, None]).squeeze(1)
        top_T[part] = logits_CV.amax(1)
        logits_CV.sub_(top_T[part, None])
        if plan.with_entropy:
            weight_CV = logits_CV.exp()
            sum_T[part] = weight_CV.sum(1)
            shifted_T[part] = weight_CV.mul_(logits_CV).sum(1)
        else:
            sum_T[part] = logits_CV.exp_().sum(1)
    return top_T, sum_T, target_T_logit, shifted_T


def _add_product(total_VH: Tensor, grad_CV: Tensor, hidden_CH: Tensor) -> None:
    """total += grad^T hidden, accumulated in the dtype of ``total``."""
    if total_VH.dtype == hidden_CH.dtype:
        total_VH.addmm_(grad_CV.t(), hidden_CH)
    else:
        total_VH.add_(grad_CV.t() @ hidden_CH)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _check(
    hidden_TH: Tensor, weight_VH: Tensor, target_T: Tensor, temperature: float, chunk_tokens: int | None
) -> None:
    shapes = tuple(hidden_TH.shape), tuple(weight_VH.shape), tuple(target_T.shape)
    if [len(shape) for shape in shapes] != [2, 2, 1]:
        raise BatchError(f"hidden, weight, target have shapes {shapes}; expected [T, H], [V, H], [T].")
    if hidden_TH.shape[1] != weight_VH.shape[1] or hidden_TH.shape[0] != target_T.shape[0]:
        raise BatchError(f"hidden, weight, target have shapes {shapes}; T and H must agree in [T, H], [V, H], [T].")
    if hidden_TH.dtype != weight_VH.dtype:
        raise BatchError(f"hidden is {hidden_TH.dtype} and weight {weight_VH.dtype}; cast one of them.")
    if target_T.dtype != torch.int64:
        raise BatchError(f"target_T has dtype {target_T.dtype}, expected torch.int64; convert it with .long().")
    if not temperature > 0:
        raise BatchError(f"temperature is {temperature}; it must be greater than 0. Use 1.0 for greedy sampling.")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise BatchError(f"chunk_tokens is {chunk_tokens}; it must be at least 1, or None for the default.")
