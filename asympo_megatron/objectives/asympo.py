"""ASymPO: every response's loss divided by its own current NLL, so that |A| alone sets its strength."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from asympo_megatron.batch import ResponseBatch
from asympo_megatron.objectives.base import Objective, WeightScope, require_number
from asympo_megatron.objectives.diagnostics import ResponseSums, response_metrics
from asympo_megatron.parallel import SINGLE, ParallelGroups, Stat, spread_to_tokens, sum_per_response


@dataclass(frozen=True)
class ASymPO(Objective):
    """L = (1/N) sum_i A_i S_i / sg(max(S_i, nll_floor T_i)): our reading of the abstract of arXiv:2606.03070.

    Args:
        nll_floor: nats per token; guards 0/0 and float32 softmax error. The default is ours, not the paper's;
            0.05 to 0.3 lets confident positives fade out again.
    """

    name: ClassVar[str] = "asympo"
    weight_scope: ClassVar[WeightScope] = "response"
    nll_floor: float = 1e-3

    def __post_init__(self) -> None:
        require_number(self.name, {"nll_floor": self.nll_floor}, low=0, inclusive=False)

    def weigh(
        self, token_nll_T: Tensor, batch: ResponseBatch, groups: ParallelGroups = SINGLE
    ) -> tuple[Tensor, dict[str, Stat]]:
        """weight_t = A_i / max(S_i, nll_floor T_i) for the tokens t of response i, 0 if it has none."""
        nll_sum_R = sum_per_response(token_nll_T, batch.response_ids_T, batch.num_responses, groups.context)
        scale_R = torch.maximum(nll_sum_R, self.nll_floor * batch.token_count_R.to(nll_sum_R.dtype))
        weight_R = torch.where(batch.token_count_R > 0, batch.advantage_R / scale_R, 0.0)
        sums = ResponseSums.of_weights(weight_R, nll_sum_R, batch)
        metrics = response_metrics(sums, batch, groups, self.normalizer_count(batch, groups), self.nll_floor)
        return spread_to_tokens(weight_R, batch.response_ids_T), metrics
