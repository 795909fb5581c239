"""What objectives with a probability ratio have in common: where the old log-probs come from, divisors, metrics.

Axis suffixes: T local packed tokens, R responses of the micro-batch.
"""

import warnings
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from asympo_megatron.batch import ResponseBatch
from asympo_megatron.errors import ConfigError, UnknownNameError
from asympo_megatron.objectives.base import Normalizer, Objective, require_number
from asympo_megatron.objectives.diagnostics import ResponseSums, response_metrics
from asympo_megatron.parallel import SINGLE, ParallelGroups, Stat, spread_to_tokens, sum_per_response

MAX_LOG_RATIO = 20.0
"""exp(20) = 5e8: beyond it a ratio says only that the policies are unrelated, and float32 would soon overflow."""

NORMALIZERS = ("responses", "tokens", "constant")
OLD_LOGPROBS = ("engine", "recompute")


@dataclass(frozen=True)
class Terms:
    """A published loss, token by token, before the share 1 / l_i.

    Args:
        force_T: its derivative by the token's NLL, of all terms that the NLL appears in.
        value_T: its value.
        clipped_T: bool, tokens that are held back; None where nothing ever is.
    """

    force_T: Tensor
    value_T: Tensor
    clipped_T: Tensor | None = None


@dataclass(frozen=True)
class RatioObjective(Objective):
    """Base of the objectives on r = pi / pi_old. Subclasses define :meth:`terms`.

    Args:
        normalizer: responses: l_i = T_i, divided by N | tokens: l_i = 1, divided by all trained tokens | constant:
            l_i = constant_tokens, divided by N.
        constant_tokens: tokens, for ``normalizer="constant"`` only; usually the longest response allowed.
    """

    normalizer: Normalizer = "responses"
    constant_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.normalizer not in NORMALIZERS:
            raise UnknownNameError(f"normalizer of objective {self.name!r}", str(self.normalizer), NORMALIZERS)
        if (self.normalizer == "constant") != (self.constant_tokens is not None):
            raise ConfigError(
                f"objective {self.name!r}: normalizer is {self.normalizer!r} and constant_tokens "
                f"{self.constant_tokens!r}; normalizer='constant' needs constant_tokens, the others refuse it."
            )
        if self.constant_tokens is not None:
            require_number(self.name, {"constant_tokens": self.constant_tokens}, low=1, inclusive=True)
        if self.normalizer == "tokens" and type(self).normalizer != "tokens":
            warnings.warn(
                "normalizer='tokens' weights every response by its length: the advantages of a group no longer sum "
                "to zero in the loss. Use normalizer='responses' unless you want DAPO's token mean.",
                stacklevel=3,
            )

    @property
    def needs(self) -> frozenset[str]:
        """The log-probs of the behavior policy."""
        return frozenset({"behavior_logprob_T"})

    def old_logprob(self, batch: ResponseBatch) -> Tensor:
        """[T] log pi_old, the denominator of r."""
        assert batch.behavior_logprob_T is not None  # held by ``needs``
        return batch.behavior_logprob_T

    @abstractmethod
    def terms(self, log_ratio_T: Tensor, token_nll_T: Tensor, batch: ResponseBatch, groups: ParallelGroups) -> Terms:
        """The published loss of each token.

        Args:
            log_ratio_T: [T] log r, 0 at untrained tokens.
            token_nll_T: [T], detached.
            batch: the responses of this micro-batch.
            groups: for sums over a response.
        """

    def weigh(
        self, token_nll_T: Tensor, batch: ResponseBatch, groups: ParallelGroups = SINGLE
    ) -> tuple[Tensor, dict[str, Stat]]:
        """weight_t = force_t / l_i."""
        trained_T = batch.response_ids_T >= 0
        log_ratio_T = torch.where(trained_T, -token_nll_T - self.old_logprob(batch), 0.0)
        terms = self.terms(log_ratio_T, token_nll_T, batch, groups)
        share_T = spread_to_tokens(self.share(batch), batch.response_ids_T)
        weight_T = torch.where(trained_T, terms.force_T, 0.0) * share_T
        count, tokens = self.normalizer_count(batch, groups), trained_T.sum()
        metrics = response_metrics(ResponseSums.of_tokens(weight_T, token_nll_T, batch, groups), batch, groups, count)
        metrics["loss"] = Stat.mean((torch.where(trained_T, terms.value_T, 0.0) * share_T).sum(), count)
        if terms.clipped_T is not None:
            metrics["clip_fraction"] = Stat.mean((trained_T & terms.clipped_T).sum(), tokens)
        ratio_T = ratio_of(log_ratio_T)
        metrics["ratio"] = Stat.mean(torch.where(trained_T, ratio_T, 0.0).sum(), tokens)
        metrics["ratio_max"] = Stat.max(torch.where(trained_T, ratio_T, -torch.inf))
        metrics["ratio_ess"] = Stat.ess(torch.where(trained_T, ratio_T, 0.0))
        metrics["ratio_kl"] = Stat.mean((ratio_T - 1 - ratio_T.log()).sum(), tokens)
        return weight_T, metrics

    def share(self, batch: ResponseBatch) -> Tensor:
        """[R] 1 / l_i."""
        if self.constant_tokens is not None:
            return torch.full_like(batch.advantage_R, 1.0 / self.constant_tokens)
        return super().share(batch)


@dataclass(frozen=True)
class OldPolicyObjective(RatioObjective):
    """Base of the objectives whose pi_old is the policy at the start of the batch.

    Args:
        old_logprobs: engine: those that came with the responses stand in for pi_old | recompute: a scoring pass by
            the learner. With one optimizer step per batch the recomputed ones are the current ones and r is 1.
    """

    old_logprobs: str = "engine"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.old_logprobs not in OLD_LOGPROBS:
            raise UnknownNameError(f"old_logprobs of objective {self.name!r}", str(self.old_logprobs), OLD_LOGPROBS)

    @property
    def needs(self) -> frozenset[str]:
        """The engine's log-probs, or a scoring pass."""
        return frozenset({"behavior_logprob_T" if self.old_logprobs == "engine" else "proximal_logprob_T"})

    def old_logprob(self, batch: ResponseBatch) -> Tensor:
        """[T] log pi_old."""
        found = batch.behavior_logprob_T if self.old_logprobs == "engine" else batch.proximal_logprob_T
        assert found is not None  # held by ``needs``
        return found


def ratio_of(log_ratio: Tensor) -> Tensor:
    """exp within MAX_LOG_RATIO."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def advantages(batch: ResponseBatch) -> Tensor:
    """[T] the advantage of each token's response, 0 at untrained tokens."""
    return spread_to_tokens(batch.advantage_R, batch.response_ids_T)


def response_log_ratio(log_ratio_T: Tensor, batch: ResponseBatch, groups: ParallelGroups) -> Tensor:
    """[R] sum of log r over all tokens of each response: the log-ratio of the whole response."""
    return sum_per_response(log_ratio_T, batch.response_ids_T, batch.num_responses, groups.context)


def clipped_terms(ratio_T: Tensor, advantage_T: Tensor, clip_low: float, clip_high: float) -> Terms:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), where dr = -r dnll in the unclipped branch (PPO,
    arXiv:1707.06347)."""
    free_T = ratio_T * advantage_T
    bounded_T = ratio_T.clamp(1 - clip_low, 1 + clip_high) * advantage_T
    active_T = free_T <= bounded_T
    return Terms(torch.where(active_T, free_T, 0.0), -torch.minimum(free_T, bounded_T), ~active_T)


def require_clip(objective: str, clip_low: float, clip_high: float) -> None:
    """Refuse clip widths that mean nothing.

    Raises:
        ConfigError: negative, not finite, or a lower width above 1.
    """
    require_number(objective, {"clip_low": clip_low, "clip_high": clip_high}, low=0, inclusive=True)
    if clip_low > 1:
        raise ConfigError(f"objective {objective!r}: clip_low is {clip_low}; a ratio is never below 0, so at most 1.")
