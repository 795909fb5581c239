"""GRPO: the clipped PPO surrogate on group-relative advantages. The control that does need behavior log-probs."""

import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from asympo_megatron.batch import ResponseBatch
from asympo_megatron.errors import ConfigError, UnknownNameError
from asympo_megatron.objectives.base import Normalizer, Objective, require_number
from asympo_megatron.objectives.diagnostics import ResponseSums, response_metrics
from asympo_megatron.parallel import SINGLE, ParallelGroups, Stat, spread_to_tokens

MAX_LOG_RATIO = 20.0
"""exp(20) = 5e8: beyond it a ratio says only that the policies are unrelated, and float32 would soon overflow."""


@dataclass(frozen=True)
class GRPO(Objective):
    """L = -(1/N) sum_i (1/l_i) sum_t min(r_t A_i, clip(r_t, 1 - clip_low, 1 + clip_high) A_i), r = pi / mu.

    Args:
        clip_low: how far below 1 a ratio is still followed; below 1 itself.
        clip_high: how far above 1; DAPO (arXiv:2503.14476) raises it to 0.28.
        normalizer: responses: l_i = T_i (GRPO, arXiv:2402.03300) | tokens: l_i = 1 and division by all trained tokens
            instead of N (DAPO's token mean) | constant: l_i = constant_tokens (Dr. GRPO, arXiv:2503.20783).
        constant_tokens: tokens, for ``normalizer="constant"`` only; usually the longest response allowed.
    """

    name: ClassVar[str] = "grpo"
    needs: ClassVar[frozenset[str]] = frozenset({"behavior_logprob_T"})
    clip_low: float = 0.2
    clip_high: float = 0.2
    normalizer: Normalizer = "responses"
    constant_tokens: int | None = None

    def __post_init__(self) -> None:
        require_number(self.name, {"clip_low": self.clip_low, "clip_high": self.clip_high}, low=0, inclusive=True)
        if self.clip_low > 1:
            raise ConfigError(f"objective 'grpo': clip_low is {self.clip_low}; a ratio is never below 0, so at most 1.")
        if self.normalizer not in ("responses", "tokens", "constant"):
            raise UnknownNameError(
                "normalizer of objective 'grpo'", str(self.normalizer), ("responses", "tokens", "constant")
            )
        if (self.normalizer == "constant") != (self.constant_tokens is not None):
            raise ConfigError(
                f"objective 'grpo': normalizer is {self.normalizer!r} and constant_tokens {self.constant_tokens!r}; "
                "normalizer='constant' needs constant_tokens, the others refuse it."
            )
        if self.constant_tokens is not None:
            require_number(self.name, {"constant_tokens": self.constant_tokens}, low=1, inclusive=True)
        if self.normalizer == "tokens":
            warnings.warn(
                "normalizer='tokens' weights every response by its length: the advantages of a group no longer sum "
                "to zero in the loss. Use normalizer='responses' unless you want DAPO's token mean.",
                stacklevel=2,
            )

    def weigh(
        self, token_nll_T: Tensor, batch: ResponseBatch, groups: ParallelGroups = SINGLE
    ) -> tuple[Tensor, dict[str, Stat]]:
        """weight_t = A_i r_t / l_i where the unclipped branch is the smaller one, else 0."""
        assert batch.behavior_logprob_T is not None  # held by ``needs``
        trained_T = batch.response_ids_T >= 0
        log_ratio_T = torch.where(trained_T, -token_nll_T - batch.behavior_logprob_T, 0.0)
        ratio_T = log_ratio_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        advantage_T = spread_to_tokens(batch.advantage_R, batch.response_ids_T)
        free_T = ratio_T * advantage_T
        clipped_T = ratio_T.clamp(1 - self.clip_low, 1 + self.clip_high) * advantage_T
        active_T = free_T <= clipped_T
        share_T = spread_to_tokens(self._share(batch), batch.response_ids_T)
        weight_T = torch.where(active_T, free_T, 0.0) * share_T
        count = self.normalizer_count(batch, groups)
        metrics = response_metrics(ResponseSums.of_tokens(weight_T, token_nll_T, batch, groups), batch, groups, count)
        tokens = trained_T.sum()
        surrogate_T = torch.minimum(free_T, clipped_T) * share_T
        metrics["loss"] = Stat.mean(-surrogate_T.sum(), count)
        metrics["clip_fraction"] = Stat.mean((trained_T & ~active_T).sum(), tokens)
        metrics["ratio"] = Stat.mean(torch.where(trained_T, ratio_T, 0.0).sum(), tokens)
        metrics["ratio_max"] = Stat.max(torch.where(trained_T, ratio_T, -torch.inf))
        metrics["behavior_kl"] = Stat.mean((ratio_T - 1 - ratio_T.log()).sum(), tokens)
        return weight_T, metrics

    def _share(self, batch: ResponseBatch) -> Tensor:
        """1 / l_i."""
        if self.normalizer == "responses":
            return torch.where(
                batch.token_count_R > 0, batch.token_count_R.to(batch.advantage_R.dtype).reciprocal(), 0.0
            )
        if self.constant_tokens is not None:
            return torch.full_like(batch.advantage_R, 1.0 / self.constant_tokens)
        return torch.ones_like(batch.advantage_R)
