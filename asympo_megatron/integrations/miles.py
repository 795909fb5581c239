"""miles: ``--loss-type custom_loss --custom-loss-function-path asympo_megatron.integrations.miles.asympo_loss``.

Checked against miles 31f1ca9 of 2026-08-21 (``backends/training_utils/{loss,cp_utils}.py``, ``loss_hub/``).

The contract is slime's, with other import paths: process groups in a ``ParallelState``, ``[1, T, V]`` logits for
``--qkv-format thd`` and ``[B, longest, V]`` for ``bshd`` (then ``batch["max_seq_lens"]``). Tokens are CP-local, in
zigzag order after ``get_log_probs_and_entropy`` whatever the split. The divisor is the number of rollouts of the step,
which is N where a rollout is one sample.

What it saves: ``--use-rollout-logprobs`` skips the log-prob forward pass; the engine's log-probs then only give the
advantages their shape. miles asks the engine for log-probs whatever the flags. ``--skip-actor-forward-only`` refuses
custom losses, and ``--rollout-data-postprocess-path`` is called without the data.
"""

from collections.abc import Callable
from typing import Any

from miles.backends.training_utils.cp_utils import get_local_response_loss_masks
from miles.backends.training_utils.loss_hub.logit_processors import get_log_probs_and_entropy
from miles.backends.training_utils.parallel import get_parallel_state
from torch import Tensor

from asympo_megatron.integrations.cp_local import gather_batch, group_advantages, objective_loss, objective_of
from asympo_megatron.parallel import ParallelGroups

__all__ = ["asympo_loss", "group_advantages"]


def asympo_loss(
    args: Any, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective that ``--custom-config-path`` names, summed over the responses of a micro-batch.

    Args:
        args: miles' namespace. batch: lists with one entry a sample. logits: [1, T, V / TP] or [B, longest, V / TP].
        sum_of_sample_mean: not used: it divides by the tokens of a rollout.

    Returns:
        (sum over this rank's tokens, figures as 0-d tensors).

    Raises:
        ConfigError, BatchError: flags or data that would change the gradient.
    """
    objective = objective_of(args)
    total, length, longest = batch["total_lengths"], batch["response_lengths"], batch.get("max_seq_lens")
    scored = get_log_probs_and_entropy(
        logits,
        args=args,
        unconcat_tokens=batch["unconcat_tokens"],
        total_lengths=total,
        response_lengths=length,
        with_entropy=False,
        max_seq_lens=longest,
    )
    masks = get_local_response_loss_masks(total, length, batch["loss_masks"], args.qkv_format, longest)
    context = get_parallel_state().cp
    groups = ParallelGroups(context=context.group if context.size > 1 else None)
    token_nll_T, responses = gather_batch(batch, scored["log_probs"], masks, objective.needs, groups)
    return objective_loss(objective, token_nll_T, responses, groups, logits)
