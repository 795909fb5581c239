"""A penalty on the divergence from a reference policy, added to any objective.

Axis suffixes: T local packed tokens, R responses of the micro-batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from asympo_megatron.batch import ResponseBatch
from asympo_megatron.errors import UnknownNameError
from asympo_megatron.objectives.base import Normalizer, Objective, WeightScope, require_number
from asympo_megatron.objectives.ratio import ratio_of
from asympo_megatron.parallel import SINGLE, ParallelGroups, Stat, spread_to_tokens, sum_per_response

ESTIMATORS = ("k1", "k2", "k3")


@dataclass(frozen=True)
class KLPenalty(Objective):
    """L = L_objective + coef (1/N) sum_i (1/l_i) sum_t k_t, l_i and N being those of the objective.

    With d_t = log pi_ref - log pi of the sampled token, and dd/dnll = 1:

        k3 = exp(d) - 1 - d        weight coef (exp(d_t) - 1) / l_i: its own derivative; on-policy an unbiased gradient
                                   of the token's KL(pi_ref || pi), the other direction
        k2 = d^2 / 2               weight coef d_t / l_i: its own derivative; on-policy an unbiased gradient of the
                                   token's KL(pi || pi_ref)
        k1 = -d                    weight coef (1/l_i) sum over the response of d: **not** its derivative, which is -1
                                   on every token, 0 on average, and regularises nothing. This is the score-function
                                   gradient, as if -coef k1 were a reward of the response: on-policy an unbiased
                                   gradient of the KL between whole responses (over l_i)

    On responses of another policy all three are biased, as the penalty itself is. log pi and log pi_ref are at the
    sampling temperature. Estimators after J. Schulman, "Approximating KL divergence" (2020).

    Args:
        objective: what is penalised; its statistics are reported without the penalty, ``loss`` with it.
        coef: of the penalty.
        estimator: k1 | k2 | k3.
    """

    name: ClassVar[str] = "kl_penalty"
    objective: Objective
    coef: float
    estimator: str = "k3"

    def __post_init__(self) -> None:
        require_number(self.name, {"coef": self.coef}, low=0, inclusive=True)
        if self.estimator not in ESTIMATORS:
            raise UnknownNameError("KL estimator", str(self.estimator), ESTIMATORS)

    @property
    def needs(self) -> frozenset[str]:
        """What the objective needs, and the reference policy."""
        return self.objective.needs | {"reference_logprob_T"}

    @property
    def normalizer(self) -> Normalizer:
        """That of the objective."""
        return self.objective.normalizer

    @property
    def weight_scope(self) -> WeightScope | None:
        """That of the objective, if the penalty's is the same."""
        own: WeightScope = "response" if self.estimator == "k1" else "token"
        inner = self.objective.weight_scope
        return inner if inner in (own, None) else "mixed"

    def normalizer_count(self, batch: ResponseBatch, groups: ParallelGroups = SINGLE) -> Tensor:
        """That of the objective."""
        return self.objective.normalizer_count(batch, groups)

    def statistics(self, batches: Sequence[ResponseBatch], groups: ParallelGroups = SINGLE) -> Mapping[str, Tensor]:
        """Those of the objective."""
        return self.objective.statistics(batches, groups)

    def weigh(
        self, token_nll_T: Tensor, batch: ResponseBatch, groups: ParallelGroups = SINGLE
    ) -> tuple[Tensor, dict[str, Stat]]:
        """The objective's weight plus that of the penalty."""
        assert batch.reference_logprob_T is not None  # held by ``needs``
        weight_T, metrics = self.objective.weigh(token_nll_T, batch, groups)
        trained_T = batch.response_ids_T >= 0
        gap_T = torch.where(trained_T, batch.reference_logprob_T + token_nll_T, 0.0)
        share_R = self.objective.share(batch)
        share_T = spread_to_tokens(share_R, batch.response_ids_T)
        if self.estimator == "k1":
            value_T = -gap_T
            total_R = share_R * sum_per_response(gap_T, batch.response_ids_T, batch.num_responses, groups.context)
            force_T = spread_to_tokens(total_R, batch.response_ids_T)
        elif self.estimator == "k2":
            value_T, force_T = gap_T * gap_T / 2, gap_T * share_T
        else:
            growth_T = ratio_of(gap_T) - 1
            value_T, force_T = growth_T - gap_T, growth_T * share_T
        count = self.normalizer_count(batch, groups)
        own_loss = metrics.get("loss") or Stat.mean(torch.where(trained_T, weight_T * token_nll_T, 0.0).sum(), count)
        penalty = Stat.mean(self.coef * (value_T * share_T).sum(), count.new_zeros(()))
        metrics["loss"] = own_loss.merge(penalty)
        metrics["reference_kl"] = Stat.mean(value_T.sum(), trained_T.sum())
        return weight_T + self.coef * force_T, metrics


def penalize_kl(objective: Objective, coef: float, estimator: str = "k3") -> Objective:
    """``objective`` with a KL penalty, or itself for ``coef`` 0: no reference policy is then loaded or run."""
    return KLPenalty(objective, coef, estimator) if coef else objective
