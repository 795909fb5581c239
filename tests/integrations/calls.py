"""Each adapter called as its framework calls it, on the parity batch; the gradient [P, V] of one optimizer step.

The same calls serve the recorded contracts (fast) and the real packages (``make test-integrations``).
"""

from types import SimpleNamespace

import torch
from parity import CASES, assert_same_gradient, core_gradient

from asympo_megatron.objectives import build_objective

ONE = [list(range(12))]
TWO = [[0, 2, 3, 5, 8, 9], [1, 4, 6, 7, 10, 11]]
UNEVEN = [[3], [0, 1, 2, 4, 5, 6, 7, 8], [9, 10, 11]]  # the first holds the masked response alone


def check_gradient(gradient, name, batch):
    """``gradient`` is that of the core for the objective ``name`` with the options of ``CASES``."""
    _, want_PV = core_gradient(build_objective(name, **CASES[name]), batch)
    assert_same_gradient(gradient, want_PV, batch)


def accumulate(batch, microbatches, loss_of):
    """The summed gradient of ``loss_of(rows, part, log-probs of the part)`` over micro-batches."""
    leaf_PV = batch.leaf()
    for rows in microbatches:
        part, index = batch.rows(rows)
        loss_of(rows, part, part.logprob(leaf_PV[index])).backward()
    return leaf_PV.grad


def spread(part, value_R=None):
    """A value a response, at its trained tokens: [R, L]; what group-relative estimators hand over."""
    value_R = part.advantage_R if value_R is None else value_R
    return part.pad(value_R[part.row_P] * part.mask_P)


def verl_gradient(policy_loss, config, batch, microbatches, dp_size=1):
    """As ``ppo_loss`` of ``verl/workers/utils/losses.py``; the gradients of DP ranks are averaged by FSDP."""
    config.global_batch_info.update(
        dp_size=dp_size, batch_num_tokens=int(batch.mask_P.sum()), global_batch_size=12, loss_scale_factor=None
    )

    def loss_of(rows, part, logprob_P):
        loss, metrics = policy_loss(
            old_log_prob=torch.full_like(part.mask_RL, torch.nan, dtype=torch.float32),
            log_prob=part.pad(logprob_P, -1.0),
            advantages=spread(part),
            response_mask=part.mask_RL,
            loss_agg_mode="token-mean",
            config=config,
            rollout_is_weights=None,
        )
        assert all(value == value for value in metrics.values())
        return loss

    return accumulate(batch, microbatches, loss_of) / dp_size


def skyrl_gradient(policy_loss, config, divide, batch, microbatches):
    """As ``_forward_backward_micro`` of SkyRL's worker; ``divide`` is its loss reduction over the mini-batch."""
    divided_RL = divide(
        advantages=spread(batch),
        loss_mask=batch.mask_RL.float(),
        loss_reduction=config.loss_reduction,
        micro_batch_size=len(microbatches[0]),
        max_seq_len=32,
    )

    def loss_of(rows, part, logprob_P):
        loss, _ = policy_loss(
            part.pad(logprob_P, -1.0),
            None,
            divided_RL[rows][:, : part.mask_RL.shape[1]],
            config=config,
            loss_mask=part.mask_RL.float(),
            rollout_logprobs=None,
        )
        return loss

    return accumulate(batch, microbatches, loss_of)


def areal_gradient(loss_fn, weight_fn, batch, microbatches):
    """One optimizer step with what AReaL's actor hands to ``engine.train_batch``.

    Every micro-batch is weighed with ``loss_weight_fn`` over the sum of the weights, as in
    ``FSDPEngine._compute_logprobs_and_loss``.
    """
    total = sum(int(weight_fn(packed(batch.rows(rows)[0]))) for rows in microbatches)

    def loss_of(rows, part, logprob_P):
        data = packed(part)
        logprob_S = packed_logprob(part, logprob_P)
        nothing_S = torch.zeros_like(logprob_S)
        loss = loss_fn(logprob_S, nothing_S, data, vocab_min_logits=nothing_S, vocab_max_logits=nothing_S)
        return loss * weight_fn(data) / total

    return accumulate(batch, microbatches, loss_of)


def packed(part):
    """AReaL's micro-batch: full sequences one after the other, mask and advantages shifted to the scoring position."""
    total = int(part.sequence_length_R.sum())
    place = part.scoring_index_P
    return {
        "input_ids": part.sequence_tokens,
        "loss_mask": torch.zeros(total).index_put((place,), part.mask_P.float()),
        "advantages": torch.zeros(total).index_put((place,), part.advantage_R[part.row_P]),
        "cu_seqlens": torch.cat([torch.zeros(1), part.sequence_length_R.cumsum(0)]).int(),
    }


def packed_logprob(part, logprob_P):
    """[S]; positions that score no response token hold other numbers."""
    total = int(part.sequence_length_R.sum())
    return torch.linspace(-9, -1, total).index_put((part.scoring_index_P,), logprob_P)


def correction(**changes):
    """SkyRL's ``off_policy_correction`` section, at its defaults but for ``changes``."""
    names = (
        "tis_ratio_type",
        "sequence_mask_metric",
        "outlier_token_is_threshold_low",
        "outlier_token_is_threshold_high",
        "token_mask_is_threshold_low",
        "token_mask_is_threshold_high",
    )
    return SimpleNamespace(**{**dict.fromkeys(names), **changes})


CORRECTIONS = [
    {"tis_ratio_type": "token"},
    {"sequence_mask_metric": "product"},
    {"outlier_token_is_threshold_low": 1e-4},
    {"outlier_token_is_threshold_high": 100.0},
    {"token_mask_is_threshold_low": 0.5, "token_mask_is_threshold_high": 2.0},
]
"""What switches SkyRL's off-policy correction on."""
