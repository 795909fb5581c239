"""Megatron's forward-step callback: model output -> objective -> the 3-tuple that makes 1/N exact.

Axis suffixes: T local packed tokens.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from asympo_megatron.batch import ResponseBatch
from asympo_megatron.mcore.collate import MicroBatch
from asympo_megatron.parallel import ParallelGroups, Stat

Objective = Callable[..., Any]
"""``objective(token_nll_T, batch, groups=...)`` -> ObjectiveOutput."""

LOSS_SUM, RESPONSES = "_loss_sum", "_responses"
"""Statistics the learner itself reads: the loss before division, and the rows seen."""


def run_model(batch: MicroBatch, model: Any) -> Tensor:
    """[2, T] token NLL and entropy on the last pipeline stage, what goes to the next one on the others."""
    # Positions come from the packed lengths and the mask from causality inside each of them, hence the two None.
    output: Tensor = model(
        batch.tokens,
        None,
        None,
        labels=batch.targets,
        packed_seq_params=batch.packed,
        padding_mask=batch.padding,
    )
    return output


def loss_terms(
    objective: Objective, token_nll_T: Tensor, responses: ResponseBatch, groups: ParallelGroups
) -> tuple[Tensor, Tensor, Mapping[str, Stat]]:
    """(loss sum of the local tokens, count, statistics of the objective): Megatron's 3-tuple.

    ``schedules.forward_step_calc_loss`` with ``calculate_per_token_loss`` divides by nothing and accumulates the
    counts; ``finalize_model_grads`` divides the gradient, summed over DP x CP, by the counts summed over DP x CP.
    The objective counts on one context-parallel rank only, so the divisor is exactly N.
    """
    out = objective(token_nll_T, responses, groups=groups)
    # Where no token is trained the loss must still reach every parameter: backward runs the same collectives.
    loss_sum = out.loss_sum if out.loss_sum.requires_grad else token_nll_T.sum() * 0.0
    return loss_sum, out.normalizer_count.to(torch.int), out.metrics


class ForwardStep:
    """``forward_step_func`` of Megatron's schedules for one objective."""

    def __init__(self, objective: Objective, groups: ParallelGroups) -> None:
        self._objective, self._groups = objective, groups

    def __call__(self, batches: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
        batch = next(batches)
        return run_model(batch, model), lambda nll_and_entropy_2T: self._loss(nll_and_entropy_2T, batch)

    def _loss(self, nll_and_entropy_2T: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor, dict[str, Stat]]:
        """(loss sum of the local tokens, count, statistics)."""
        token_nll_T, entropy_T = nll_and_entropy_2T.unbind(0)
        loss_sum, count, metrics = loss_terms(self._objective, token_nll_T, batch.responses, self._groups)
        return loss_sum, count, {**self._own_stats(loss_sum, count, entropy_T.detach(), batch), **metrics}

    def _own_stats(self, loss_sum: Tensor, count: Tensor, entropy_T: Tensor, batch: MicroBatch) -> dict[str, Stat]:
        """What is known for any objective; its own statistics of the same name take precedence."""
        trained_T = batch.responses.response_ids_T >= 0
        trained = trained_T.sum()
        # Whole rows are known on every context-parallel rank: the first one counts them. new_full fills on the device;
        # new_tensor would wait for a copy from the host.
        first = int(self._groups.context_rank == 0)
        return {
            LOSS_SUM: Stat.sum(loss_sum),
            RESPONSES: Stat.sum(count.new_full((), first * batch.responses.num_responses)),
            "loss": Stat.mean(loss_sum, count),
            "entropy": Stat.mean(torch.where(trained_T, entropy_T, 0.0).sum(), trained),
            "tokens": Stat.sum(trained),
            "input_tokens": Stat.sum(count.new_full((), first * batch.real_tokens)),
        }
