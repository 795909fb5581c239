"""Output layer, token NLL and objective in one pass: both gradients are made while the logits are there.

Axis suffixes: T local packed tokens, K trained tokens of them, C tokens of one chunk, U tokens of one unit (whole
responses that share a chunk, or one that takes several), R responses of the micro-batch, H hidden, V vocabulary rows.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from asympo_megatron.batch import ObjectiveOutput, ResponseBatch
from asympo_megatron.errors import BatchError, ConfigError
from asympo_megatron.objectives.base import Objective
from asympo_megatron.parallel.groups import SINGLE, ParallelGroups
from asympo_megatron.parallel.logit_tiles import LogitTiles, TileBuffer, add_product, wide_dtype
from asympo_megatron.parallel.token_nll import check_inputs, token_nll

CHUNK_BYTES = 256 * 2**20
"""Default size of the float32 logits of a chunk: 441 tokens of 151,936 vocabulary rows."""


def fused_objective_loss(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    target_T: Tensor,
    batch: ResponseBatch,
    objective: Objective,
    *,
    temperature: float = 1.0,
    groups: ParallelGroups = SINGLE,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
) -> ObjectiveOutput:
    """``objective(token_nll(hidden, weight, target), batch)`` in three products of the output layer's size, not four.

        loss = sum_t w_t nll_t,   d loss / d logits_tv = w_t (p_tv - 1[v = target_t]) / temperature

    Logits of a chunk of tokens are made once. A chunk holds whole responses, so their weights, and with them both
    gradients, are known while it is there. A response longer than a chunk: where the weight of a token needs no NLL
    but its own, nothing changes; where all its tokens share one weight, its gradient is gathered in a [V, H] scratch
    that is added with the weight; otherwise its logits are made a second time. Untrained tokens cost nothing.

    The gradients wait for backward, at least in float32: [V, H], and as much again for the scratch. Backward
    multiplies them by the gradient of ``loss_sum`` and hands them over, so it runs once.

    Args:
        hidden_TH: [T, H] float.
        weight_VH: [V, H], the same dtype: the whole output layer.
        target_T: int64 [T]; where a token is untrained any id may stand.
        batch: whole responses; the trained tokens of each stand in a row, untrained ones may lie between them.
        objective: one that declares its ``weight_scope``, as all of ``OBJECTIVES`` do.
        temperature: logits are divided by it: score at the temperature that sampled.
        groups: one rank of tensor and of context parallelism.
        vocab_size: true vocabulary; rows of padding behind it get probability 0 and gradient 0. None: no padding.
        chunk_tokens: tokens of a chunk; None: as many as ``CHUNK_BYTES`` hold.

    Returns:
        What the objective returns for the token NLLs; ``loss_sum`` is differentiable.

    Raises:
        BatchError: tensors that do not fit together, split responses, targets outside of the vocabulary.
        ConfigError: more than one rank, or an objective whose weights cannot be known response by response.
    """
    check_inputs(hidden_TH, weight_VH, target_T, temperature)
    _check_support(objective, groups, chunk_tokens)
    objective.check(target_T, batch)
    learned = hidden_TH.requires_grad, weight_VH.requires_grad
    if not (torch.is_grad_enabled() and any(learned)):
        return objective(
            token_nll(hidden_TH, weight_VH, target_T, temperature=temperature, vocab_size=vocab_size), batch
        )
    real_rows = weight_VH.shape[0] if vocab_size is None else min(vocab_size, weight_VH.shape[0])
    if chunk_tokens is None:
        chunk_tokens = max(1, CHUNK_BYTES // (4 * max(1, real_rows)))
    tiles = LogitTiles((chunk_tokens, real_rows), 0, real_rows, 1.0 / temperature)
    with torch.no_grad():
        index_K = (batch.response_ids_T >= 0).nonzero().squeeze(1)
        trained = _tokens(batch, index_K)
        work = _SinglePass(hidden_TH[index_K], weight_VH, _targets(target_T[index_K], real_rows), tiles, learned)
        for unit in _units(trained, chunk_tokens):
            work.run(unit, objective, chunk_tokens)
        out = objective(_spread(work.nll_K, index_K, target_T), batch)
        grad_hidden = None if work.grad_hidden_KH is None else _spread(work.grad_hidden_KH, index_K, target_T)
    loss_sum = _WithGradients.apply(hidden_TH, weight_VH, out.loss_sum, [grad_hidden, work.grad_weight_VH])
    return replace(out, loss_sum=loss_sum)


@dataclass(frozen=True)
class _Unit:
    """Whole responses whose tokens lie next to each other."""

    tokens: slice
    batch: ResponseBatch

    def parts(self, chunk_tokens: int) -> list[slice]:
        starts = range(self.tokens.start, self.tokens.stop, chunk_tokens)
        return [slice(start, min(self.tokens.stop, start + chunk_tokens)) for start in starts]


@dataclass(frozen=True)
class _Scored:
    """Of a chunk: exp(z - max z) and its sum, what the softmax is made of."""

    exp_CV: Tensor
    sum_C: Tensor


class _SinglePass:
    """NLLs and gradients of the trained tokens, filled in unit by unit."""

    def __init__(
        self, hidden_KH: Tensor, weight_VH: Tensor, target_K: Tensor, tiles: LogitTiles, learned: tuple[bool, bool]
    ) -> None:
        wide = wide_dtype(hidden_KH.dtype)
        self.nll_K = hidden_KH.new_zeros(hidden_KH.shape[0], dtype=wide)
        self._coefficient_K = torch.zeros_like(self.nll_K)
        self.grad_hidden_KH = torch.zeros_like(hidden_KH, dtype=wide) if learned[0] else None
        self.grad_weight_VH = torch.zeros_like(weight_VH, dtype=wide) if learned[1] else None
        self._hidden_KH, self._target_K, self._tiles = hidden_KH, target_K, tiles
        self._weight_VH = weight_VH[: tiles.real_rows]
        self._buffer = TileBuffer(tiles, hidden_KH, spare=False)
        self._scratch_VH: Tensor | None = None

    def run(self, unit: _Unit, objective: Objective, chunk_tokens: int) -> None:
        parts = unit.parts(chunk_tokens)
        if len(parts) == 1 or objective.weight_scope == "token":
            for part in parts:
                scored = self._score(part)
                self._weigh(unit, objective)
                self._add(part, scored, self._coefficient_K[part], self.grad_weight_VH)
        elif objective.weight_scope == "response":
            self._run_scratch(unit, parts, objective)
        else:
            for part in parts:
                self._score(part)
            self._weigh(unit, objective)
            for part in parts:
                self._add(part, self._score(part), self._coefficient_K[part], self.grad_weight_VH)

    def _run_scratch(self, unit: _Unit, parts: list[slice], objective: Objective) -> None:
        """One response: gradients of the plain sum of its NLLs first, its weight at the end."""
        scratch_VH = self._cleared_scratch()
        for part in parts:
            scored = self._score(part)
            self._add(part, scored, torch.ones_like(scored.sum_C), scratch_VH)
        self._weigh(unit, objective)
        coefficient_U = self._coefficient_K[unit.tokens]
        if not torch.equal(coefficient_U, coefficient_U[:1].expand_as(coefficient_U)):
            raise ConfigError(
                f"objective {objective.name!r} declares weight_scope 'response' and weighs the tokens of one response "
                "differently; declare 'token' or 'mixed'."
            )
        if self.grad_hidden_KH is not None:
            self.grad_hidden_KH[unit.tokens] *= coefficient_U[0]
        if self.grad_weight_VH is not None and scratch_VH is not None:
            self.grad_weight_VH.addcmul_(scratch_VH, coefficient_U[0])

    def _cleared_scratch(self) -> Tensor | None:
        if self._scratch_VH is not None:
            return self._scratch_VH.zero_()
        if self.grad_weight_VH is not None:
            self._scratch_VH = torch.zeros_like(self.grad_weight_VH)
        return self._scratch_VH

    def _score(self, part: slice) -> _Scored:
        """Fill in the NLLs of a chunk. What is returned lives until the next call."""
        logits_CV = self._buffer.logits(self._hidden_KH[part], self._weight_VH)
        top_C = logits_CV.amax(1)
        target_C = logits_CV.gather(1, self._target_K[part, None]).squeeze(1)
        exp_CV = logits_CV.sub_(top_C[:, None]).exp_()
        sum_C = exp_CV.sum(1)
        self.nll_K[part] = sum_C.log() - (target_C - top_C)
        return _Scored(exp_CV, sum_C)

    def _weigh(self, unit: _Unit, objective: Objective) -> None:
        """Weights of the unit; NLLs that are not there yet are 0."""
        self._coefficient_K[unit.tokens], _ = objective.weigh(self.nll_K[unit.tokens], unit.batch)

    def _add(self, part: slice, scored: _Scored, coefficient_C: Tensor, grad_weight_VH: Tensor | None) -> None:
        """The gradients of sum_t coefficient_t nll_t over the chunk, in the place of ``scored``."""
        coefficient_C = coefficient_C * self._tiles.inverse_temperature
        grad_CV = scored.exp_CV.mul_((coefficient_C / scored.sum_C)[:, None])
        grad_CV.scatter_add_(1, self._target_K[part, None], -coefficient_C[:, None])
        factor_CV = self._buffer.for_product(grad_CV)
        if self.grad_hidden_KH is not None:
            add_product(self.grad_hidden_KH[part], factor_CV, self._weight_VH)
        if grad_weight_VH is not None:
            add_product(grad_weight_VH[: self._tiles.real_rows], factor_CV.t(), self._hidden_KH[part])


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients are known already."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, loss_sum: Tensor, gradients: list[Tensor | None]
    ) -> Tensor:
        ctx.gradients, ctx.dtypes = gradients, (hidden_TH.dtype, weight_VH.dtype)
        return loss_sum.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "fused_objective_loss: backward ran twice; the gradients were handed over the first time, as a copy "
                "of [V, H] would be needed to keep them. Call it again, or use token_nll with the objective."
            )
        # In place, and not kept: autograd then takes them over as .grad without another copy.
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [
            None if gradient is None else gradient.mul_(grad_loss).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None


def _units(trained: ResponseBatch, chunk_tokens: int) -> Iterator[_Unit]:
    """As many next responses as fit into a chunk, and longer ones alone."""
    row_N, count_N = (found.tolist() for found in torch.unique_consecutive(trained.response_ids_T, return_counts=True))
    twice = [row for row, runs in Counter(row_N).items() if runs > 1]
    if twice:
        raise BatchError(
            f"the trained tokens of response {twice[0]} lie on both sides of another response's; "
            "fused_objective_loss expects those of a response in a row. Reorder them, or use token_nll."
        )
    first = start = stop = 0
    for end, count in enumerate(count_N):
        if stop > start and stop - start + count > chunk_tokens:
            yield _unit(trained, slice(start, stop), row_N[first:end])
            first, start = end, stop
        stop += count
    if stop > start:
        yield _unit(trained, slice(start, stop), row_N[first:])


def _unit(trained: ResponseBatch, tokens: slice, rows: list[int]) -> _Unit:
    """The batch of some responses, renumbered."""
    part = _tokens(trained, tokens)
    row_R = torch.tensor(rows, device=part.response_ids_T.device)
    new_R = row_R.new_zeros(trained.num_responses).index_copy_(0, row_R, torch.arange(len(rows), device=row_R.device))
    return _Unit(
        tokens,
        replace(
            part,
            response_ids_T=new_R[part.response_ids_T],
            advantage_R=trained.advantage_R[row_R],
            token_count_R=trained.token_count_R[row_R],
        ),
    )


def _tokens(batch: ResponseBatch, index: Tensor | slice) -> ResponseBatch:
    """Some of the tokens of a batch."""
    names = ("response_ids_T", "behavior_logprob_T", "proximal_logprob_T", "reference_logprob_T")
    found = {name: value[index] for name in names if (value := getattr(batch, name)) is not None}
    return replace(batch, **found)


def _spread(values_K: Tensor, index_K: Tensor, like_T: Tensor) -> Tensor:
    """[T] or [T, H]: values of the trained tokens in their places, 0 elsewhere."""
    return values_K.new_zeros((like_T.shape[0], *values_K.shape[1:])).index_copy_(0, index_K, values_K)


def _targets(target_K: Tensor, real_rows: int) -> Tensor:
    outside_K = (target_K < 0) | (target_K >= real_rows)
    if outside_K.any():
        raise BatchError(
            f"target {int(target_K[outside_K][0])} of a trained token is outside of the vocabulary of {real_rows}; "
            "give the token the response id -1, or pass the true vocab_size."
        )
    return target_K


def _check_support(objective: Objective, groups: ParallelGroups, chunk_tokens: int | None) -> None:
    if groups.tensor_size > 1 or groups.context_size > 1:
        raise ConfigError(
            f"fused_objective_loss got {groups.tensor_size} tensor-parallel and {groups.context_size} context-parallel "
            "ranks; it needs the whole vocabulary and whole responses on one. Use token_nll and call the objective."
        )
    if objective.weight_scope is None:
        raise ConfigError(
            f"objective {objective.name!r} declares no weight_scope, so its weights may depend on other responses. "
            "Declare it (asympo_megatron.objectives.Objective.weight_scope), or use token_nll and call the objective."
        )
    if chunk_tokens is not None and chunk_tokens < 1:
        raise BatchError(f"chunk_tokens is {chunk_tokens}; it must be at least 1, or None for the default.")
