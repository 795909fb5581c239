"""verl: ``actor_rollout_ref.actor.policy_loss.loss_mode=asympo`` (or ``asympo_spo``), after pip install.

Checked against verl 0.9.1 (``verl/__init__.py``, ``trainer/ppo/core_algos.py``, ``workers/utils/losses.py``,
``trainer/ppo/v1/trainer_base.py``).

``import verl`` loads this module through the entry-point group ``verl.plugins``, in every process. verl calls the loss
with padded [R, L] tensors of whole responses, also under context parallelism. The terms of the tokens go through verl's
``agg_loss`` as ``seq-mean-token-sum``, whatever ``loss_agg_mode`` says: that mode divides by ``global_batch_size``, the
responses of the mini-batch over all ranks, so micro-batches add up. The default ``token-mean`` would undo the balance
between responses. ``loss_agg_mode`` still holds for verl's own entropy and KL terms.

Options: ``policy_loss._target_=asympo_megatron.integrations.verl.AsympoPolicyLossConfig`` accepts ``nll_floor`` and
``negative_scale`` beside verl's own fields (on the command line with a leading ``+``).

What it saves: ``algorithm.rollout_correction.bypass_mode=True`` drops the old-log-prob forward pass of the default (V1)
trainers (``_compute_old_log_prob``). They then copy the engine's log-probs, which the objective never reads, so
``rollout.calculate_log_probs=True`` stays on. Older trainers (``main_ppo_v0``, ``experimental/``) overwrite
``loss_mode`` in bypass mode: leave it off there.
"""

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from asympo_megatron.errors import BatchError, ConfigError, IntegrationError
from asympo_megatron.integrations.padded import figures, padded_token_loss
from asympo_megatron.objectives import SPO, ASymPO

_AGGREGATION = "seq-mean-token-sum"
_LOG = logging.getLogger(__name__)

try:
    from verl.trainer.ppo import core_algos
    from verl.workers.config import PolicyLossConfig
except ImportError as error:
    # verl logs a plug-in that fails at DEBUG only, so this must speak for itself.
    _LOG.error("asympo_megatron: the losses asympo and asympo_spo are not registered with verl: %s", error)
    raise IntegrationError(f"verl has no plug-in point where 0.9.1 has it: {error}. Install verl 0.9.1.") from error


@dataclass
class AsympoPolicyLossConfig(PolicyLossConfig):
    """verl's ``policy_loss`` section with the options of our objectives; None takes the objective's default."""

    nll_floor: float | None = None
    negative_scale: float | None = None


def _policy_loss(kind: type[ASymPO] | type[SPO], option: str) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    """A verl policy loss; its objective takes ``option`` from ``config.policy_loss``."""

    def policy_loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """The loss of a micro-batch and its figures; ``old_log_prob`` and ``loss_agg_mode`` are not read.

        Raises:
            BatchError: no global batch size, or advantages that differ inside a response.
            ConfigError: importance weights are on, or the option is out of range.
        """
        value = config.policy_loss.get(option)
        objective = kind() if value is None else kind(**{option: value})
        if rollout_is_weights is not None:
            raise ConfigError(
                f"{objective.name} takes no importance weights. Set algorithm.rollout_correction.rollout_is=null."
            )
        scale = config.global_batch_info
        if scale.get("global_batch_size") is None:
            raise BatchError(
                "verl handed over no global_batch_size, so micro-batches would be averaged, not added. Use a trainer "
                "that fills config.global_batch_info (verl 0.9: workers/utils/losses.py)."
            )
        terms, stats = padded_token_loss(objective, log_prob, response_mask, advantages)
        loss = core_algos.agg_loss(
            loss_mat=terms,
            loss_mask=response_mask,
            loss_agg_mode=_AGGREGATION,
            dp_size=scale["dp_size"],
            global_batch_size=scale["global_batch_size"],
        )
        return loss, {f"actor/{objective.name}/{name}": value for name, value in figures(stats).items()}

    return policy_loss


asympo = _policy_loss(ASymPO, "nll_floor")
asympo_spo = _policy_loss(SPO, "negative_scale")


def _check_hook() -> None:
    """verl's own functions still take our arguments and mean by them what 0.9.1 does.

    Raises:
        IntegrationError: they do not.
    """
    called = {"old_log_prob", "log_prob", "advantages", "response_mask", "loss_agg_mode", "config"}
    given = set(inspect.signature(core_algos.get_policy_loss_fn("vanilla")).parameters)
    if given != called | {"rollout_is_weights"}:
        raise IntegrationError(f"verl's policy losses take {sorted(given)}; this adapter knows those of 0.9.1.")
    terms, mask = torch.tensor([[1.0, 2.0], [4.0, 9.0], [5.0, 5.0]]), torch.tensor([[1, 1], [1, 0], [0, 0]])
    got = core_algos.agg_loss(
        loss_mat=terms, loss_mask=mask, loss_agg_mode=_AGGREGATION, dp_size=2, global_batch_size=7
    )
    if abs(float(got) - 2 * (1 + 2 + 4) / 7) > 1e-6:
        raise IntegrationError(
            f"verl's agg_loss({_AGGREGATION!r}) gave {float(got)}, expected 2: the sum of the tokens x dp_size / "
            "global_batch_size, as in 0.9.1. Install that version."
        )


def register() -> None:
    """Register ``asympo`` and ``asympo_spo``; called when this module is imported.

    Raises:
        IntegrationError: verl's hook is missing or has changed, or the names are taken by another package.
    """
    try:
        _check_hook()
        for name, function in {"asympo": asympo, "asympo_spo": asympo_spo}.items():
            taken = core_algos.POLICY_LOSS_REGISTRY.get(name)
            if taken is not None and taken.__module__ != __name__:
                raise IntegrationError(f"verl already has a policy loss {name!r} of {taken.__module__}.")
            core_algos.register_policy_loss(name)(function)
    except Exception as error:
        _LOG.error("asympo_megatron: the losses asympo and asympo_spo are not registered with verl: %s", error)
        if isinstance(error, IntegrationError):
            raise
        raise IntegrationError(f"verl's plug-in point has changed: {error}. Install verl 0.9.1.") from error


register()
