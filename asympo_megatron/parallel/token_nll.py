"""Linear output layer and token NLL in one, without ever holding the [T, V] logits.

Axis suffixes: T local packed tokens, C tokens of one tile, H hidden, V rows of the local vocabulary shard, B rows of
one tile of it.
"""

from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from asympo_megatron.errors import BatchError
from asympo_megatron.parallel import main_grad
from asympo_megatron.parallel.groups import SINGLE, ParallelGroups, max_over, sum_over
from asympo_megatron.parallel.logit_tiles import (
    LogitTiles,
    TileBuffer,
    add_product,
    default_tile_bytes,
    shard_sums,
    wide_dtype,
)


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
    tile: tuple[int, int] | None = ...,
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
    tile: tuple[int, int] | None = ...,
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
    tile: tuple[int, int] | None = None,
    sum_hidden_grad: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Negative log-probability of each target under softmax(hidden weight^T / temperature).

        nll_t = log sum_v exp(z_tv) - z_t,target      entropy_t = - sum_v p_tv log p_tv

    Logits are made tile by tile and made again in backward (a fourth GEMM). Over a tensor-parallel group the call costs
    one MAX of [T] and one SUM of [2, T] ([3, T] with entropy), however many tiles; backward none for logits.

    Args:
        hidden_TH: [T, H] float, replicated over ``groups.tensor`` (sequence parallelism gathered before).
        weight_VH: [V, H], the same dtype: this rank's contiguous vocabulary shard, equally large on every rank. Where
            it has a ``main_grad`` (Megatron's gradient buffer) its gradient is added there, and nowhere else.
        target_T: int64 [T], ids of the whole vocabulary. Where a token is untrained any id may stand.
        temperature: logits are divided by it: score at the temperature that sampled.
        groups: only ``groups.tensor`` is used.
        with_entropy: also return the entropy [T]; it carries gradient if it is used in the loss.
        vocab_size: true vocabulary; rows of padding behind it get probability 0 and gradient 0. None: no padding.
        tile: tokens and vocabulary rows of the logits that exist at a time; None: 2048 of both on a
            CPU, 4096 elsewhere.
        sum_hidden_grad: False: the gradient of ``hidden_TH`` is this vocabulary shard's part, as behind Megatron's
            ColumnParallelLinear, whose input copy (or sequence-parallel gather) sums it in its own backward.
            True: summed over ``groups.tensor`` here, for a caller whose hidden states have no such copy.

    Returns:
        nll_T [T], or (nll_T, entropy_T), in max(float32, dtype of hidden), equal on all ranks of ``groups.tensor``.
        Both gradients accumulate over tiles in that dtype.

    Raises:
        BatchError: shapes, dtypes, temperature or tile that cannot work.
    """
    check_inputs(hidden_TH, weight_VH, target_T, temperature, tile)
    shard = weight_VH.shape[0]
    first_id = groups.tensor_rank * shard
    real_rows = shard if vocab_size is None else min(max(vocab_size - first_id, 0), shard)
    plan = _Plan(
        tiles=LogitTiles(tile, first_id, real_rows, 1.0 / temperature, default_tile_bytes(hidden_TH.device)),
        tensor=groups.tensor,
        with_entropy=with_entropy,
        sum_hidden_grad=sum_hidden_grad,
    )
    nll_T, entropy_T = _LinearTokenNLL.apply(hidden_TH, weight_VH, target_T, plan)
    return (nll_T, entropy_T) if with_entropy else nll_T


@dataclass(frozen=True)
class _Plan:
    tiles: LogitTiles
    tensor: dist.ProcessGroup | None
    with_entropy: bool
    sum_hidden_grad: bool


class _LinearTokenNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, target_T: Tensor, plan: _Plan) -> tuple[Tensor, Tensor]:
        own = shard_sums(hidden_TH, weight_VH, target_T, plan.tiles, plan.with_entropy)
        top_T = max_over(own.top_T.clone(), plan.tensor)
        sums = own.relative_to(top_T)
        owned_T, _ = plan.tiles.columns(target_T, slice(0, plan.tiles.real_rows))
        rows = [sums.sum_T, torch.where(owned_T, sums.target_T - top_T, 0.0)]
        if sums.shifted_T is not None:
            rows.append(sums.shifted_T)
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
        if grad_nll_T is None:
            grad_nll_T = torch.zeros_like(log_sum_exp_T)
        buffer_VH = main_grad.buffer_of(weight_VH) if ctx.needs_input_grad[1] else None
        grad_weight = torch.zeros_like(weight_VH) if ctx.needs_input_grad[1] and buffer_VH is None else None
        grad_hidden = torch.zeros_like(hidden_TH, dtype=log_sum_exp_T.dtype) if ctx.needs_input_grad[0] else None
        state = _Saved(target_T, log_sum_exp_T, grad_nll_T, grad_entropy_T, entropy_T)
        _add_gradients(
            hidden_TH, weight_VH, state, plan.tiles, grad_hidden, grad_weight if buffer_VH is None else buffer_VH
        )
        if grad_hidden is not None:
            grad_hidden = grad_hidden.to(hidden_TH.dtype)
            if plan.sum_hidden_grad:
                sum_over(grad_hidden, plan.tensor)
        if buffer_VH is not None:
            main_grad.gradient_was_added(weight_VH)
        return grad_hidden, grad_weight, None, None


@dataclass(frozen=True)
class _Saved:
    """What backward knows of every token."""

    target_T: Tensor
    log_sum_exp_T: Tensor
    grad_nll_T: Tensor
    grad_entropy_T: Tensor | None
    entropy_T: Tensor

    def logit_gradient(
        self, logits_CB: Tensor, part: slice, columns: tuple[Tensor, Tensor], buffer: TileBuffer
    ) -> Tensor:
        """The gradient of the scaled logits of a tile, in the place of the logits."""
        inside_C, column_C = columns
        grad_nll_C = self.grad_nll_T[part]
        log_prob_CB = logits_CB.sub_(self.log_sum_exp_T[part, None])
        if self.grad_entropy_T is None:
            grad_CB = log_prob_CB.exp_().mul_(grad_nll_C[:, None])
        else:  # d entropy / d z_v = - p_v (log p_v + entropy)
            prob_CB = torch.exp(log_prob_CB, out=buffer.spare(log_prob_CB))
            log_prob_CB.add_(self.entropy_T[part, None]).mul_(-self.grad_entropy_T[part, None])
            grad_CB = log_prob_CB.add_(grad_nll_C[:, None]).mul_(prob_CB)
        return grad_CB.scatter_add_(1, column_C[:, None], torch.where(inside_C, -grad_nll_C, 0.0)[:, None])


def _add_gradients(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    saved: _Saved,
    tiles: LogitTiles,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
) -> None:
    """Add both gradients to the tensors given; that of the hidden states must be given in the wide dtype."""
    tokens = hidden_TH.shape[0]
    buffer = TileBuffer(tiles, hidden_TH, spare=saved.grad_entropy_T is not None)
    for rows in tiles.row_parts(tokens):
        # Vocabulary outside: a narrow weight gradient needs float32 for one block of rows only, not for all [V, H].
        block_BH = None
        if grad_weight is not None:
            wide = torch.promote_types(grad_weight.dtype, wide_dtype(hidden_TH.dtype))
            block_BH = grad_weight[rows]
            if grad_weight.dtype != wide:
                block_BH = torch.zeros_like(block_BH, dtype=wide)
        for part in tiles.token_parts(tokens):
            logits_CB = buffer.logits(hidden_TH[part], weight_VH[rows])
            grad_CB = saved.logit_gradient(logits_CB, part, tiles.columns(saved.target_T[part], rows), buffer)
            if tiles.inverse_temperature != 1.0:
                grad_CB.mul_(tiles.inverse_temperature)
            factor_CB = buffer.for_product(grad_CB)
            if grad_hidden is not None:
                add_product(grad_hidden[part], factor_CB, weight_VH[rows])
            if block_BH is not None:
                add_product(block_BH, factor_CB.t(), hidden_TH[part])
        if grad_weight is not None and block_BH is not None and block_BH.dtype != grad_weight.dtype:
            grad_weight[rows] += block_BH


def check_inputs(
    hidden_TH: Tensor, weight_VH: Tensor, target_T: Tensor, temperature: float, tile: tuple[int, int] | None = None
) -> None:
    """Raise what :func:`token_nll` would raise."""
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
    if tile is not None and min(tile) < 1:
        raise BatchError(f"tile is {tile}; both numbers must be at least 1, or None for the default.")
    buffer_VH = main_grad.buffer_of(weight_VH)
    if buffer_VH is not None and buffer_VH.shape != weight_VH.shape:
        raise BatchError(f"main_grad has shape {tuple(buffer_VH.shape)}; the weight's is {tuple(weight_VH.shape)}.")
