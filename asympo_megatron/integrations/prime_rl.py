"""prime-rl: ``[trainer.loss] type = "custom", import_path = "asympo_megatron.integrations.prime_rl.asympo_loss"``.

Checked against prime-rl v0.8.1.dev67 (559b447) of 2026-08-21 (``src/prime_rl/trainer/rl/{loss,train}.py``).

The function gets one sequence a call, gathered over context parallelism, every tensor ``[seq]`` and aligned with the
tokens it scores. The trainer sums the losses and divides by the RL tokens of the global batch (``rl_scale``), and no
option changes that: a loss per response cannot learn how many responses the batch holds. So the scale is explicit:
``tokens_per_response`` in ``[trainer.loss.kwargs]`` multiplies every response alike. With the mean trained length of
a response the gradient is the core's; with another figure it is the core's times one factor, the same for all responses
of a step: their balance is exact in any case, and AdamW hardly sees a constant factor.

What it saves: nothing in the trainer, which has no old-log-prob pass. ``inference_logprobs`` arrive and are not read.
"""

from typing import Any

import torch
from prime_rl.trainer.rl.loss import LossInputs, LossOutputs

from asympo_megatron.batch import UNTRAINED
from asympo_megatron.errors import ConfigError
from asympo_megatron.integrations.broadcast import gather_responses, require
from asympo_megatron.objectives import build_objective


def asympo_loss(
    inputs: LossInputs, *, tokens_per_response: float, objective: str = "asympo", **options: Any
) -> LossOutputs:
    """One sequence's loss sum x ``tokens_per_response``.

    Args:
        inputs: one sequence.
        tokens_per_response: tokens; see the module.
        objective: a name, an entry point, or ``package.module:Class``. options: its fields.

    Raises:
        ConfigError: a scale that is no positive number, or an objective that is divided by tokens.
        BatchError: advantages or weights that differ inside the sequence.
    """
    chosen = build_objective(objective, **options)
    if not (isinstance(tokens_per_response, (int, float)) and tokens_per_response > 0):
        raise ConfigError(
            f"trainer.loss.kwargs.tokens_per_response is {tokens_per_response!r}; set it to the mean trained length of "
            "a response, in tokens: prime-rl divides by tokens, the objective by responses."
        )
    scale = 1.0 if chosen.normalizer == "tokens" else float(tokens_per_response)
    mask_T = inputs.loss_mask
    if inputs.loss_weights is not None:
        require(
            (~mask_T | (inputs.loss_weights == 1)).all(),
            "rl_weights other than 0 and 1: a weight per token has no meaning for a loss per response. Remove them.",
        )
    batch = gather_responses(
        inputs.advantages.float(),
        torch.where(mask_T, 0, UNTRAINED),
        1,
        behavior_logprob_T=inputs.inference_logprobs.float(),
        reference_logprob_T=None if inputs.ref_logprobs is None else inputs.ref_logprobs.float(),
    )
    out = chosen(-inputs.trainer_logprobs, batch)
    figures = {name: out.metrics[name].values_K[0].float() for name in ("J", "nll") if name in out.metrics}
    return LossOutputs(loss=out.loss_sum * scale, metrics=figures)
