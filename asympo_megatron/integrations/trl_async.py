"""TRL: ``from asympo_megatron.integrations.trl_async import AsympoAsyncGRPOTrainer as AsyncGRPOTrainer``.

Checked against trl 1.16.0 (``experimental/async_grpo/async_grpo_trainer.py``, ``packing.py``).

TRL packs the samples of a rank into one row without padding, in which samples share the tokens they have in common, and
lists the loss terms: position, sample, advantage. It divides by the tokens of each micro-batch, which undoes the
balance between responses; here the divisor is the number of responses. TRL's loss still runs, on the same model
outputs, for its metrics and counters.

What it saves: there is no old-log-prob forward pass to drop. The engine's log-probs (TRL asks vLLM for them whatever
the flags) only feed the metrics ``ratio``, ``kl`` and ``clip_ratio``: a rollout worker of your own may send zeros.
"""

import inspect
from typing import Any

from torch import Tensor

from asympo_megatron.batch import ResponseBatch
from asympo_megatron.errors import ConfigError, IntegrationError
from asympo_megatron.integrations.broadcast import gather_responses
from asympo_megatron.integrations.padded import figures, require_no_behavior_data
from asympo_megatron.objectives import ASymPO, Objective

try:
    from trl.experimental.async_grpo import AsyncGRPOTrainer
except ImportError as error:
    raise IntegrationError(f"trl has no AsyncGRPOTrainer where 1.16.0 has it: {error}. Install trl 1.16.0.") from error


class AsympoAsyncGRPOTrainer(AsyncGRPOTrainer):
    """AsyncGRPOTrainer with one of our objectives.

    Args:
        *args, **kwargs: as AsyncGRPOTrainer.
        objective: default ``ASymPO()``.
        responses_per_step: fixed divisor of a step, for ``token_budget`` > 0 (TRL's default), under which the number
            of responses varies from step to step. Not needed with ``token_budget=0``.

    Raises:
        ConfigError: ``token_budget`` is on and no divisor is given.
    """

    def __init__(
        self, *args: Any, objective: Objective | None = None, responses_per_step: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.objective = ASymPO() if objective is None else objective
        self.responses_per_step = responses_per_step
        require_no_behavior_data(self.objective)
        if responses_per_step is None and (self.args.token_budget is None or self.args.token_budget > 0):
            raise ConfigError(
                f"token_budget is {self.args.token_budget}: micro-batches hold different numbers of responses, and "
                "their means would not add up. Set token_budget=0, or pass responses_per_step as a fixed divisor."
            )

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The objective over this rank's row; TRL's own loss is only evaluated for its metrics and counters."""
        seen: list[Any] = []

        def recording(**kwargs: Any) -> Any:
            seen.append(model(**kwargs))
            return seen[-1]

        super().compute_loss(recording, inputs)
        if len(seen) != 1:
            raise IntegrationError(f"trl called the model {len(seen)} times in one loss; 1.16.0 calls it once.")
        out = self.objective(*_row(inputs, seen[0].log_probs))
        if self.responses_per_step is None:
            # Over all ranks, samples without trained tokens included.
            responses = (inputs["global_n_forward_tokens"][0] / inputs["mean_seq_len"][0]).round()
            divisor = responses * self.current_gradient_accumulation_steps
        else:
            divisor = self.responses_per_step
        # Gradients are averaged over ranks; the divisor counts all of them.
        loss = out.loss_sum * self.accelerator.num_processes / divisor
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * seen[0].aux_loss / self.current_gradient_accumulation_steps
        for name, value in figures(out.metrics).items():
            self._metrics["train"][f"{self.objective.name}/{name}"].append(value)
        return loss


def _row(inputs: dict[str, Any], logprob_1S: Tensor) -> tuple[Tensor, ResponseBatch]:
    """Token NLLs and responses of one packed row: a loss term names its position, its response and its advantage."""
    real = inputs["token_index"] >= 0
    index_T, ids_T = inputs["token_index"][real], inputs["segment_id"][real].long()
    rows = int(ids_T.max()) + 1 if ids_T.numel() else 0
    return -logprob_1S.flatten()[index_T], gather_responses(inputs["advantages"][real], ids_T, rows)


def _check_hook() -> None:
    """TRL still calls the loss with what is passed on here.

    Raises:
        IntegrationError: it does not.
    """
    given = list(inspect.signature(AsyncGRPOTrainer.compute_loss).parameters)
    if given != ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]:
        raise IntegrationError(f"trl's AsyncGRPOTrainer.compute_loss takes {given}. Install trl 1.16.0.")


_check_hook()
