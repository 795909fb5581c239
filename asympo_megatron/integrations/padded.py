"""Right-padded rows with one response each, as verl, SkyRL, OpenRLHF and TRL hand them over.

Axis suffixes: R responses of the micro-batch, L padded response positions, T = R x L flattened.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from asympo_megatron.batch import ResponseBatch
from asympo_megatron.errors import ConfigError
from asympo_megatron.integrations.broadcast import padded_ids, response_value
from asympo_megatron.objectives import Objective
from asympo_megatron.parallel import Stat, reduce_stats

FIGURES = (
    "J",
    "abs_advantage_nll_pos",
    "abs_advantage_nll_neg",
    "weighted_nll_pos",
    "weighted_nll_neg",
    "zero_advantage_fraction",
)
"""Means over responses: defined in every micro-batch, so that frameworks may average them over micro-batches."""


def require_no_behavior_data(objective: Objective) -> None:
    """Adapters without behavior log-probs take objectives that need none and are divided by responses.

    Raises:
        ConfigError: another objective.
    """
    if objective.needs or objective.normalizer != "responses":
        needs = ", ".join(sorted(objective.needs)) or "nothing"
        raise ConfigError(
            f"objective {objective.name!r} needs {needs} and is divided by {objective.normalizer}; this adapter hands "
            "over no log-probs of other policies and divides by responses. Use asympo, spo or reinforce."
        )


def require_off(section: Any, off: Mapping[str, Any], prefix: str = "") -> None:
    """Settings that an objective has no use for must have the value that switches them off.

    Args:
        section: the framework's settings. off: the value of each. prefix: of the names, as a user writes them.

    Raises:
        ConfigError: one has another value.
    """
    for name, value in off.items():
        if getattr(section, name) != value:
            raise ConfigError(
                f"{prefix}{name} is {getattr(section, name)!r}: the objective has no use for it, or it breaks the zero "
                f"sum of a group. Set {prefix}{name}={value}."
            )


def padded_token_loss(
    objective: Objective, logprob_RL: Tensor, mask_RL: Tensor, advantage: Tensor
) -> tuple[Tensor, Mapping[str, Stat]]:
    """Each token's term of the loss; their sum over all responses, divided by N, is the objective.

    Args:
        objective: weighs the tokens.
        logprob_RL: differentiable log-probs of the sampled tokens under the current policy.
        mask_RL: non-zero at trained tokens.
        advantage: [R], or [R, L] with one value a response.

    Returns:
        weight x NLL [R, L], exactly 0 at untrained tokens, and the objective's statistics, which stay on the device:
        :func:`figures` makes numbers of them, for frameworks that log some at every micro-batch.

    Raises:
        BatchError: the tokens of a response differ in their advantage.
    """
    ids_T = padded_ids(mask_RL)
    rows = mask_RL.shape[0]
    advantage_R = advantage if advantage.dim() == 1 else response_value(advantage.flatten(), ids_T, rows)
    batch = ResponseBatch(ids_T, advantage_R, (mask_RL > 0).sum(dim=1))
    token_nll_T = torch.where(ids_T >= 0, -logprob_RL.flatten(), 0.0)
    with torch.no_grad():
        weight_T, stats = objective.weigh(token_nll_T.detach(), batch)
        weight_T = torch.where(ids_T >= 0, weight_T, 0.0)
    return (weight_T * token_nll_T).view_as(logprob_RL), stats


def figures(stats: Mapping[str, Stat], names: Sequence[str] = FIGURES) -> dict[str, float]:
    """Those of ``names`` that the objective reports, as numbers: one copy from the device, which waits for it."""
    return reduce_stats({name: stats[name] for name in names if name in stats}, None)
