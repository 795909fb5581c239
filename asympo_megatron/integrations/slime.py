"""slime: ``--loss-type custom_loss --custom-loss-function-path asympo_megatron.integrations.slime.asympo_loss``.

Checked against slime v0.3.1-38-g624b824 of 2026-08-21 (``backends/megatron_utils/{loss,cp_utils,actor,model}.py``).

slime hands each context-parallel rank its own tokens. ``get_log_probs_and_entropy`` returns them in zigzag order, also
under ``--allgather-cp`` (contiguous split), and applies temperature, tensor parallelism and top-p replay.
``loss_function`` multiplies what we return by micro-batches / rollouts x (DP x CP), which Megatron's averaging undoes:
the divisor is the number of rollouts of the step. That is N where a rollout is one sample. ``sum_of_sample_mean`` is
not used: it divides by ``rollout_mask_sums``, which span the samples of a rollout.

What it saves: with ``--disable-compute-advantages-and-returns --rollout-data-postprocess-path
asympo_megatron.integrations.slime.fill_advantages`` the log-prob forward pass (and the reference model's) is not run.
``--use-rollout-logprobs`` alone also skips it, but reads the shapes of the engine's log-probs. slime asks the engine
for log-probs whatever the flags (``rollout/sglang_rollout.py``); only a custom generate function can leave that out.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import mpu
from slime.backends.megatron_utils.cp_utils import slice_log_prob_with_cp
from slime.backends.megatron_utils.loss import get_log_probs_and_entropy, get_rollout_top_p_logprob_kwargs
from torch import Tensor

from asympo_megatron.integrations.cp_local import gather_batch, group_advantages, objective_loss, objective_of
from asympo_megatron.parallel import ParallelGroups

__all__ = ["asympo_loss", "fill_advantages", "group_advantages"]


def asympo_loss(
    args: Any, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective that ``--custom-config-path`` names, summed over the responses of a micro-batch.

    Args:
        args: slime's namespace. batch: lists with one entry a sample. logits: float32 [1, T, V / TP], CP-local.
        sum_of_sample_mean: not used.

    Returns:
        (sum over this rank's tokens, figures as 0-d tensors).

    Raises:
        ConfigError, BatchError: flags or data that would change the gradient.
    """
    objective = objective_of(args)
    lengths = batch["total_lengths"], batch["response_lengths"]
    _, scored = get_log_probs_and_entropy(
        logits,
        args=args,
        unconcat_tokens=batch["unconcat_tokens"],
        total_lengths=lengths[0],
        response_lengths=lengths[1],
        with_entropy=False,
        **get_rollout_top_p_logprob_kwargs(args, batch),
    )
    masks = [slice_log_prob_with_cp(*row) for row in zip(batch["loss_masks"], *lengths, strict=True)]
    groups = _groups()
    token_nll_T, responses = gather_batch(batch, scored["log_probs"], masks, objective.needs, groups)
    return objective_loss(objective, token_nll_T, responses, groups, logits)


def fill_advantages(args: Any, rollout_id: int, rollout_data: dict[str, Any]) -> None:
    """``--rollout-data-postprocess-path``: advantages from rewards alone, without any log-probabilities.

    ``rewards`` are already centred in their groups (``--advantage-estimator grpo`` or :func:`group_advantages`).
    """
    device = rollout_data["loss_masks"][0].device
    rows = zip(rollout_data["rewards"], rollout_data["total_lengths"], rollout_data["response_lengths"], strict=True)
    rollout_data["advantages"] = [
        slice_log_prob_with_cp(torch.full((length,), float(reward), device=device), total, length)
        for reward, total, length in rows
    ]


def _groups() -> ParallelGroups:
    alone = mpu.get_context_parallel_world_size() == 1
    return ParallelGroups(context=None if alone else mpu.get_context_parallel_group())
