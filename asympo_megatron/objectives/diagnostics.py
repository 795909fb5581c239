"""Statistics that every objective reports, from sums per response.

Names as in metrics.jsonl without the prefix ``train/``. Axis suffixes: T local packed tokens, R responses.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from asympo_megatron.batch import ResponseBatch
from asympo_megatron.parallel.groups import ParallelGroups
from asympo_megatron.parallel.responses import sum_per_response
from asympo_megatron.parallel.stats import Stat

INVERSE_NLL_EDGES = tuple(10.0 ** (exponent / 8) for exponent in range(-16, 49))
"""Eight bins a decade from 0.01 to 1e6: quantiles of 1/n to within 15%."""


@dataclass(frozen=True)
class ResponseSums:
    """Sums over all tokens of each response, equal on every context-parallel rank.

    Args:
        nll_R: S, the token NLLs.
        mass_R: the |weight| of the tokens.
        pull_R: |weight| x NLL of the tokens.
    """

    nll_R: Tensor
    mass_R: Tensor
    pull_R: Tensor

    @classmethod
    def of_weights(cls, weight_R: Tensor, nll_sum_R: Tensor, batch: ResponseBatch) -> "ResponseSums":
        """For objectives whose tokens share the weight of their response: no further communication."""
        weight_R = weight_R.abs()
        return cls(nll_sum_R, weight_R * batch.token_count_R, weight_R * nll_sum_R)

    @classmethod
    def of_tokens(
        cls, weight_T: Tensor, token_nll_T: Tensor, batch: ResponseBatch, groups: ParallelGroups
    ) -> "ResponseSums":
        """For objectives with a weight per token: one all-reduce of 3 R floats."""
        columns = torch.stack([token_nll_T, weight_T.abs(), weight_T.abs() * token_nll_T], dim=1)
        return cls(*sum_per_response(columns, batch.response_ids_T, batch.num_responses, groups.context).unbind(1))


def response_metrics(
    sums: ResponseSums,
    batch: ResponseBatch,
    groups: ParallelGroups,
    normalizer_count: Tensor,
    nll_floor: float | None = None,
) -> dict[str, Stat]:
    """The statistics of algorithm and batch that can be counted per response.

        J = (1/N) sum_i A_i log max(n_i, floor),   n_i = S_i / T_i

    Args:
        sums: per response, over all context-parallel ranks.
        batch: the responses of this micro-batch.
        groups: only the first context-parallel rank counts what all of them hold.
        normalizer_count: what ``weighted_nll_*`` is divided by, as the loss is.
        nll_floor: floor of n_i, nats per token; None for objectives without one.

    Returns:
        Name to :class:`Stat`, the same names whatever the batch holds.
    """
    here = groups.context_rank == 0
    trained_R = (batch.token_count_R > 0) & here
    responses = batch.token_count_R.new_full((), batch.num_responses if here else 0)
    nll_R = sums.nll_R / batch.token_count_R.clamp(min=1)
    floor = torch.finfo(nll_R.dtype).tiny if nll_floor is None else nll_floor
    floored_nll_R = nll_R.clamp(min=floor)
    strength_R = batch.advantage_R.abs() * nll_R
    metrics = {
        "J": Stat.mean(_total(trained_R, batch.advantage_R * floored_nll_R.log()), responses),
        "nll": Stat.mean(_total(trained_R, nll_R), trained_R.sum()),
    }
    for sign, mask_R in (("pos", trained_R & (batch.advantage_R > 0)), ("neg", trained_R & (batch.advantage_R < 0))):
        metrics[f"nll_{sign}"] = Stat.mean(_total(mask_R, nll_R), mask_R.sum())
        metrics[f"nll_{sign}_max"] = Stat.max(torch.where(mask_R, nll_R, -math.inf))
        metrics[f"abs_advantage_nll_{sign}"] = Stat.mean(_total(mask_R, strength_R), responses)
        metrics[f"weighted_nll_{sign}"] = Stat.mean(_total(mask_R, sums.pull_R), normalizer_count)
    metrics["nll_ratio"] = Stat.ratio(metrics["nll_neg"], metrics["nll_pos"])
    metrics["inverse_nll"] = Stat.histogram(floored_nll_R.reciprocal(), INVERSE_NLL_EDGES, trained_R)
    metrics["ess"] = Stat.ess(torch.where(trained_R, sums.mass_R, 0.0))
    metrics["responses"] = Stat.sum(responses)
    metrics["trained_tokens"] = Stat.sum(_total(trained_R, batch.token_count_R))
    metrics["untrained_responses"] = Stat.sum(responses - trained_R.sum())
    zero_R = (batch.advantage_R == 0) & here
    metrics["zero_advantage_fraction"] = Stat.mean(zero_R.sum(), responses)
    if nll_floor is not None:
        metrics["floored_fraction"] = Stat.mean((trained_R & (nll_R < nll_floor)).sum(), trained_R.sum())
    return metrics


def _total(mask_R: Tensor, value_R: Tensor) -> Tensor:
    return torch.where(mask_R, value_R, 0).sum()
