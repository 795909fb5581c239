"""Mixtures of experts: the load-balancing loss with a scale that no layout and no micro-batch count changes.

For a layer with E experts, k of them a token, and a micro-batch of T tokens,

    balance = (E / (k T^2)) sum_e count_e sum_t p_e(t)          1 where all experts get the same share

with count_e the tokens sent to expert e (a constant) and p_e(t) the router's probability. The step adds

    coefficient x sum over layers and micro-batches of (T / T_step) balance

to the loss: a mean over the tokens of the step, whatever the objective is divided by. Tokens are counted without
padding. Axis suffixes: T tokens of this rank, E experts, L layers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from asympo_megatron.errors import ConfigError
from asympo_megatron.mcore.collate import MicroBatch
from asympo_megatron.parallel import ParallelGroups
from asympo_megatron.parallel.groups import sum_over


class BalancedRouter(TopKRouter):
    """Megatron's router with this project's scale of the load-balancing and z losses.

    ``TopKRouter.attach_and_log_load_balancing_loss`` multiplies by the number of local tokens, for a gradient that
    ``finalize_model_grads`` divides by all tokens. Here it divides by responses, so that rule would be off by the mean
    length of a response; and, as each rank of TP x CP holds only its tokens' share of the loss already, by TP x CP.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loss_scale = 0.0
        """What finalize_model_grads will divide by, over the tokens of the step."""
        self.sums: Tensor | None = None
        """float64 [E + 1]: tokens of each expert and T x balance of this rank's tokens, since the step began."""

    def is_aux_loss_enabled(self) -> bool:
        """Megatron's own attachment stays off: ``routing`` below attaches the loss."""
        return False

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights and experts of each token; the gradient of the balance loss hangs on the weights.

        Args:
            padding_mask: True for padding.
        """
        probs_TE, chosen_TE = super().routing(logits, padding_mask=padding_mask)
        # Without gradient it is a scoring pass, or the first forward of a recomputed layer: neither counts.
        if self.training and torch.is_grad_enabled():
            logits_TE = logits.view(-1, self.config.num_moe_experts)
            probs_TE = self._balanced(probs_TE, chosen_TE, logits_TE, _valid(logits_TE, padding_mask))
        return probs_TE, chosen_TE

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Attach coefficient x mean over the tokens of the step of logsumexp(logits)^2."""
        coefficient = self.config.moe_z_loss_coeff
        if not coefficient or not (self.training and torch.is_grad_enabled()):
            return logits
        square_T = torch.logsumexp(logits, dim=-1).square() * _valid(logits, padding_mask)
        return MoEAuxLossAutoScaler.apply(logits, square_T.sum() * (coefficient * self.loss_scale))

    def _balanced(self, probs_TE: Tensor, chosen_TE: Tensor, logits_TE: Tensor, valid_T: Tensor) -> Tensor:
        with torch.no_grad():
            own_E = (chosen_TE & valid_T[:, None]).sum(0)
            tokens_E1 = torch.cat([own_E, valid_T.sum()[None]]).float()
            if self.tp_cp_group.size() > 1:
                dist.all_reduce(tokens_E1, group=self.tp_cp_group)
            scale = self.config.num_moe_experts / (self.topk * tokens_E1[-1].clamp(min=1.0))
        score_TE = logits_TE.float().softmax(-1)
        share = (score_TE * valid_T[:, None]).sum(0) @ tokens_E1[:-1] * scale
        sums = torch.cat([own_E, share.detach()[None]]).double()
        self.sums = sums if self.sums is None else self.sums + sums
        coefficient = self.config.moe_aux_loss_coeff
        if not coefficient:
            return probs_TE
        return MoEAuxLossAutoScaler.apply(probs_TE, share * (coefficient * self.loss_scale))


class ExpertBalance:
    """The routers of a learner around one optimizer step: the scale of their losses before it, figures after it.

    Args:
        chunks: model chunks of this rank.
        transformer: TransformerConfig of a mixture of experts.
        objective: must tell its divisor without a forward pass if a router loss is on.

    Raises:
        ConfigError: it cannot.
    """

    def __init__(self, chunks: Sequence[Any], transformer: Any, objective: Callable[..., Any], groups: ParallelGroups):
        self._routers = [m for chunk in chunks for m in chunk.modules() if isinstance(m, BalancedRouter)]
        self._transformer, self._groups = transformer, groups
        self._count = getattr(objective, "normalizer_count", None)
        self._active = bool(transformer.moe_aux_loss_coeff or transformer.moe_z_loss_coeff)
        if self._active and self._count is None:
            raise ConfigError(
                f"the objective {objective!r} has no normalizer_count(batch, groups), which the scale of the router's "
                "load-balancing loss needs. Derive it from asympo_megatron.objectives.base.Objective, or set "
                "model.megatron.moe_aux_loss_coeff=0 and no moe_z_loss_coeff."
            )

    def begin(self, batches: Sequence[MicroBatch]) -> None:
        """Collective over DP x CP if a router loss is on."""
        self._device = batches[0].tokens.device  # also of a stage without routers: its ranks join in the same sum
        scale = self._scale(batches) if self._active else 0.0
        for router in self._routers:
            router.loss_scale, router.sums = scale, None

    def figures(self) -> dict[str, float]:
        """Collective: ``moe_balance`` (mean over layers) and ``moe_max_load`` (busiest expert over the mean one)."""
        experts, layers = self._transformer.num_moe_experts, self._transformer.num_layers
        sums_LE1 = torch.zeros(layers, experts + 1, dtype=torch.float64, device=self._device)
        for router in self._routers:
            if router.sums is not None:
                sums_LE1[router.layer_number - 1] += router.sums
        if dist.get_world_size() > 1:
            dist.all_reduce(sums_LE1)
        sums_LE1 = sums_LE1[sums_LE1[:, :-1].sum(1) > 0]
        if not len(sums_LE1):
            return {}
        tokens_LE, shares_L = sums_LE1[:, :-1], sums_LE1[:, -1]
        balance_L = shares_L * self._transformer.moe_router_topk / tokens_LE.sum(1)
        load_L = tokens_LE.amax(1) / tokens_LE.mean(1)
        return {"moe_balance": float(balance_L.mean()), "moe_max_load": float(load_L.amax())}

    def _scale(self, batches: Sequence[MicroBatch]) -> float:
        assert self._count is not None
        divisor = sum(int(self._count(batch.responses, self._groups)) for batch in batches)
        # Every context-parallel rank knows the tokens of the whole rows; the objective counts on the first one only.
        tokens = sum(batch.real_tokens for batch in batches) if self._groups.context_rank == 0 else 0
        totals = sum_over(torch.tensor([divisor, tokens], device=self._device), self._groups.data_context).tolist()
        return totals[0] / max(totals[1], 1)


def _valid(logits: Tensor, padding_mask: Tensor | None) -> Tensor:
    """bool [T]: tokens that are no padding."""
    if padding_mask is None:
        return torch.ones(logits.shape[:-1].numel(), dtype=torch.bool, device=logits.device)
    return ~padding_mask.reshape(-1)
