"""What an objective is: a detached weight per token.

The loss is always ``(weight_T * token_nll_T).sum()``; the weights come out of a block without autograd, so there is no
detach that could be forgotten. Axis suffixes: T local packed tokens, R responses of the micro-batch.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from asympo_megatron.batch import ObjectiveOutput, ResponseBatch
from asympo_megatron.errors import BatchError, ConfigError
from asympo_megatron.parallel.groups import SINGLE, ParallelGroups
from asympo_megatron.parallel.stats import Stat

Normalizer = Literal["responses", "tokens", "constant"]
"""What the summed loss is divided by, once, over the global batch. ``constant`` divides by responses, too: its
objective has already divided every token by a fixed number of tokens."""


WeightScope = Literal["token", "response", "mixed"]
"""Which NLLs the weight of a token depends on: ``token``, at most its own; ``response``, those of its response, and all
tokens of a response have the same weight; ``mixed``, those of its response, and weights differ within it."""


class Objective(ABC):
    """Base of all objectives: frozen dataclasses whose fields are the options.

    Subclasses define ``name`` and :meth:`weigh`.
    """

    name: ClassVar[str]

    @property
    def needs(self) -> frozenset[str]:
        """Optional tensors of :class:`~asympo_megatron.batch.ResponseBatch` that :meth:`weigh` reads.

        ``behavior_logprob_T`` comes with the responses; ``proximal_logprob_T`` and ``reference_logprob_T`` each cost
        a scoring pass, a forward pass over the global batch before the step.
        """
        return frozenset()

    @property
    def normalizer(self) -> Normalizer:
        """What Megatron divides the summed loss by."""
        return "responses"

    @property
    def weight_scope(self) -> WeightScope | None:
        """Lets :func:`~asympo_megatron.objectives.fused_objective_loss` weigh responses one after the other.

        Beside NLLs a weight may depend on any data of its response and on ``ResponseBatch.statistics``. None: not
        declared, or it depends on other responses of the micro-batch.
        """
        return None

    @abstractmethod
    def weigh(
        self, token_nll_T: Tensor, batch: ResponseBatch, groups: ParallelGroups = SINGLE
    ) -> tuple[Tensor, dict[str, Stat]]:
        """The whole algorithm: a weight per token.

        Args:
            token_nll_T: [T], detached, nats. Values at untrained tokens mean nothing.
            batch: the responses of this micro-batch.
            groups: ``groups.context`` is the only group that an objective may communicate over.

        Returns:
            weight_T [T] such that the gradient of the objective is sum_t weight_t grad(nll_t) over all ranks and
            micro-batches, divided by the normalizer; values at untrained tokens are ignored. And local metrics.
        """

    def statistics(self, batches: Sequence[ResponseBatch], groups: ParallelGroups = SINGLE) -> Mapping[str, Tensor]:
        """Collective: what :meth:`weigh` reads of the whole global batch, through ``ResponseBatch.statistic``.

        Called once a step, before any :meth:`weigh`; by default there is nothing to know.

        Args:
            batches: every micro-batch of this rank, scored.
            groups: to be reduced over ``groups.data_context``.
        """
        return {}

    def share(self, batch: ResponseBatch) -> Tensor:
        """[R] 1 / l_i: what the term of a token is multiplied by, beside the division by the normalizer."""
        if self.normalizer == "responses":
            length_R = batch.token_count_R.to(batch.advantage_R.dtype)
            return torch.where(batch.token_count_R > 0, length_R.reciprocal(), 0.0)
        return torch.ones_like(batch.advantage_R)

    def __call__(self, token_nll_T: Tensor, batch: ResponseBatch, groups: ParallelGroups = SINGLE) -> ObjectiveOutput:
        """Sum of weight x token_nll over this rank's trained tokens.

        A rank without any trained token still returns a loss connected to ``token_nll_T`` (with gradient zero), so
        that its backward pass takes part in every collective.

        Args:
            token_nll_T: [T], differentiable, nats, under the current policy at the sampling temperature.
            batch: the responses of this micro-batch.
            groups: injected process groups.

        Returns:
            Sums and counts, to be added over micro-batches, CP and DP and divided once; see
            :class:`~asympo_megatron.batch.ObjectiveOutput`.

        Raises:
            BatchError: token_nll_T does not match the batch, or data that the objective needs is missing.
        """
        self.check(token_nll_T, batch)
        trained_T = batch.response_ids_T >= 0
        with torch.no_grad():
            weight_T, metrics = self.weigh(token_nll_T.detach(), batch, groups)
            # Both factors are selected, not multiplied by a mask: padding may hold inf or NaN.
            weight_T = torch.where(trained_T, weight_T, 0.0)
        loss_sum = (weight_T * torch.where(trained_T, token_nll_T, 0.0)).sum()
        count = self.normalizer_count(batch, groups)
        return ObjectiveOutput(loss_sum, count, {"loss": Stat.mean(loss_sum, count), **metrics})

    def normalizer_count(self, batch: ResponseBatch, groups: ParallelGroups = SINGLE) -> Tensor:
        """int64 0-d: this micro-batch's share of the normalizer, 0 except on the first context-parallel rank."""
        if groups.context_rank != 0:
            return batch.token_count_R.new_zeros(())
        if self.normalizer == "tokens":
            return batch.token_count_R.sum()
        return batch.token_count_R.new_full((), batch.num_responses)

    def check(self, token_nll_T: Tensor, batch: ResponseBatch) -> None:
        """Raise what calling the objective would raise."""
        if token_nll_T.shape != batch.response_ids_T.shape:
            raise BatchError(
                f"token_nll_T has shape {tuple(token_nll_T.shape)} and response_ids_T "
                f"{tuple(batch.response_ids_T.shape)}; both hold one entry a local token."
            )
        for name in sorted(self.needs):
            if getattr(batch, name) is None:
                raise BatchError(
                    f"objective {self.name!r} needs {name}, which the batch does not carry. Provide it, or use an "
                    "objective that reads the current policy only: asympo, spo, reinforce."
                )


def require_number(
    objective: str, options: Mapping[str, object], *, low: float = -math.inf, inclusive: bool = False
) -> None:
    """Refuse options that are not finite numbers above (or at) ``low``.

    Raises:
        ConfigError: the message names objective, option, value and range.
    """
    bound = "" if low == -math.inf else f" at least {low:g}" if inclusive else f" greater than {low:g}"
    for name, value in options.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (number and low <= float(value) < math.inf and (inclusive or value != low)):  # type: ignore[arg-type]
            raise ConfigError(f"objective {objective!r}: {name} is {value!r}; it must be a finite number{bound}.")
