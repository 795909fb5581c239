"""Responses whose tokens lie on several context-parallel ranks, as slime and miles hand them over.

Each rank holds a list of 1-D tensors, one a response, with the response tokens that are its own (possibly none). Their
order does not matter, so the zigzag and the contiguous split look the same here: only sums per response travel. Axis
suffixes: T local response tokens of all responses, R responses of the micro-batch.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from asympo_megatron.advantages import compute_advantages
from asympo_megatron.batch import UNTRAINED, ResponseBatch
from asympo_megatron.errors import BatchError, ConfigError
from asympo_megatron.integrations.broadcast import response_value
from asympo_megatron.objectives import Objective, build_objective
from asympo_megatron.parallel import ParallelGroups

_SOURCES = {
    "behavior_logprob_T": "rollout_log_probs",
    "proximal_logprob_T": "log_probs",
    "reference_logprob_T": "ref_log_probs",
}
"""Which key of their batch holds what an objective may need."""

_IGNORED = {
    "use_kl_loss": (False, "--use-kl-loss"),
    "entropy_coef": (0, "--entropy-coef"),
    "use_tis": (False, "--use-tis"),
    "use_opsm": (False, "--use-opsm"),
    "use_opd": (False, "--use-opd"),
    "get_mismatch_metrics": (False, "--get-mismatch-metrics"),
    "custom_pg_loss_reducer_function_path": (None, "--custom-pg-loss-reducer-function-path"),
}
"""Options that only their own policy loss reads: attribute, value that switches it off, flag."""


def objective_of(args: Any) -> Objective:
    """The objective that ``--custom-config-path`` names, after a look at the flags that would spoil it.

    Args:
        args: their namespace; ``asympo_objective`` (default "asympo") and ``asympo_options`` (a mapping) come from the
            YAML file given as ``--custom-config-path``.

    Raises:
        ConfigError: a flag that a custom loss ignores or that changes the scale; the message names it.
    """
    for name, (off, flag) in _IGNORED.items():
        if getattr(args, name, off) != off:
            raise ConfigError(f"{flag} is set, but a custom loss never reads it. Remove the flag.")
    if args.normalize_advantages:
        raise ConfigError(
            "--normalize-advantages whitens over tokens: the advantages of a group no longer sum to zero. Remove it."
        )
    objective = build_objective(getattr(args, "asympo_objective", "asympo"), **getattr(args, "asympo_options", {}))
    if args.calculate_per_token_loss != (objective.normalizer == "tokens"):
        change = "Add" if objective.normalizer == "tokens" else "Remove"
        raise ConfigError(
            f"objective {objective.name!r} is divided by {objective.normalizer}, and --calculate-per-token-loss "
            f"(now {args.calculate_per_token_loss}) divides by tokens. {change} --calculate-per-token-loss."
        )
    return objective


def gather_batch(
    batch: Mapping[str, Any],
    log_probs: Sequence[Tensor],
    local_masks: Sequence[Tensor],
    needs: frozenset[str],
    groups: ParallelGroups,
) -> tuple[Tensor, ResponseBatch]:
    """Token NLLs and the batch of an objective.

    Args:
        batch: their micro-batch; ``advantages`` are lists like ``log_probs``, ``loss_masks`` span whole responses.
        log_probs: one [t_i] tensor a response, this rank's tokens.
        local_masks: the loss masks of the same tokens.
        needs: what the objective declares.
        groups: ``groups.context`` is their context-parallel group.

    Returns:
        token_nll_T and the :class:`ResponseBatch`.

    Raises:
        BatchError: a key is missing, or advantages differ inside a response.
    """
    if not batch.get("advantages"):
        raise BatchError(
            "the batch has no advantages. With --disable-compute-advantages-and-returns they come from "
            "--rollout-data-postprocess-path asympo_megatron.integrations.slime.fill_advantages."
        )
    # Row numbers are filled in on the device: lengths copied there would be waited for.
    ids_T = torch.cat([torch.where(mask > 0, row, UNTRAINED) for row, mask in enumerate(local_masks)])
    extra: dict[str, Any] = {}
    for name in needs:
        if not batch.get(_SOURCES[name]):
            raise BatchError(f"the objective needs {name}; the batch has no {_SOURCES[name]!r}. Record them first.")
        extra[name] = torch.cat(list(batch[_SOURCES[name]])).float()
    responses = ResponseBatch(
        response_ids_T=ids_T,
        advantage_R=response_value(torch.cat(list(batch["advantages"])).float(), ids_T, len(log_probs), groups.context),
        token_count_R=torch.stack([mask.sum() for mask in batch["loss_masks"]]).long(),
        **extra,
    )
    return -torch.cat(list(log_probs)), responses


def objective_loss(
    objective: Objective, token_nll_T: Tensor, responses: ResponseBatch, groups: ParallelGroups, logits: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """(sum over this rank's tokens, figures): the framework adds up ranks and micro-batches and divides once."""
    out = objective(token_nll_T, responses, groups=groups)
    loss = out.loss_sum
    if token_nll_T.numel() == 0:
        # A rank without response tokens must still run the backward pass of the model. An empty slice has gradient 0
        # even where padded vocabulary holds -inf; elsewhere that dense 0 would cost as much memory as the logits.
        loss = loss + logits[..., :0].sum()
    figures = {"loss": loss.detach()}
    if objective.normalizer != "tokens":
        per_response = ("J", "abs_advantage_nll_pos", "abs_advantage_nll_neg", "zero_advantage_fraction")
        figures |= {name: out.metrics[name].values_K[0].float() for name in per_response if name in out.metrics}
    return loss, figures


def group_advantages(args: Any, samples: Sequence[Any]) -> tuple[list[float], list[float]]:
    """``--custom-reward-post-process-path``: advantages of each complete group, whatever the sizes of the groups.

    Both stacks centre over the whole batch when groups differ in size. ``asympo_advantage`` in
    ``--custom-config-path`` names the estimator (default group_mean).

    Returns:
        (raw rewards, advantages), in the order of the samples.
    """
    rewards = [float(sample.get_reward_value(args)) for sample in samples]
    groups: defaultdict[Any, list[int]] = defaultdict(list)
    for row, sample in enumerate(samples):
        if sample.group_index is None:
            raise BatchError(f"sample {row} has no group_index: its group is unknown. Set it in the rollout function.")
        groups[sample.group_index].append(row)
    advantages = list(rewards)
    for rows in groups.values():
        estimator = getattr(args, "asympo_advantage", "group_mean")
        for row, value in zip(rows, compute_advantages([rewards[row] for row in rows], estimator), strict=True):
            advantages[row] = value
    return rewards, advantages
