"""SkyRL: ``trainer.override_entrypoint=asympo_megatron.integrations.skyrl trainer.algorithm.policy_loss_type=asympo``.

Checked against skyrl 0.3.0 (``backends/skyrl_train/utils/ppo_utils.py``, ``backends/skyrl_train/workers/worker.py``,
``train/trainer.py``, ``train/entrypoints/main_base.py``).

SkyRL divides the advantages before the loss (``apply_loss_reduction_to_advantages_minibatch``) and the loss must sum.
With ``trainer.algorithm.loss_reduction=sequence_mean`` the divisor is N x T_i, from which A_i / N is had back; the
other reductions, the default ``token_mean`` among them, divide by token numbers that the loss does not see: an error.

Options: ``+trainer.algorithm`` has no room for new keys, so a main of your own calls ``register(nll_floor=...,
negative_scale=...)`` before ``main()``.

What it saves: the old-log-prob forward pass. SkyRL skips it for a fixed set of losses only, so ``main`` runs a trainer
whose ``_skip_policy_forward`` says yes, unless a KL reward or an off-policy correction needs the result. Then
``generator.sampling_params.logprobs=null`` also stops the engine from returning log-probs.
"""

import functools
import inspect
import sys
from typing import Any

import ray
import torch
from torch import Tensor

from asympo_megatron.errors import ConfigError, IntegrationError
from asympo_megatron.integrations.padded import figures, padded_token_loss, require_no_behavior_data, require_off
from asympo_megatron.objectives import SPO, ASymPO, Objective

try:
    from skyrl.backends.skyrl_train.utils import ppo_utils
    from skyrl.backends.skyrl_train.utils.off_policy_correction_utils import off_policy_correction_enabled
except ImportError as error:
    raise IntegrationError(f"skyrl has no policy losses where 0.3.0 has them: {error}. Install 0.3.0.") from error

_REDUCTION = "sequence_mean"


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    config: Any,
    loss_mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    *,
    objective: Objective,
) -> tuple[Tensor, dict[str, float]]:
    """The objective as a SkyRL policy loss: a sum whose divisor is already in ``advantages``.

    Raises:
        ConfigError: another loss reduction, whitened advantages, or an off-policy correction.
        BatchError: advantages that differ inside a response.
    """
    if config.loss_reduction != _REDUCTION:
        raise ConfigError(
            f"trainer.algorithm.loss_reduction is {config.loss_reduction!r}, which divides by tokens and undoes the "
            f"balance between responses. Set trainer.algorithm.loss_reduction={_REDUCTION}."
        )
    require_off(config, {"advantage_batch_normalize": False}, "trainer.algorithm.")
    if off_policy_correction_enabled(config.off_policy_correction):
        raise ConfigError(
            f"{objective.name} takes no importance weights, and no masks by them. Unset every ratio, metric and "
            "threshold of trainer.algorithm.off_policy_correction."
        )
    mask_RL = torch.ones_like(log_probs) if loss_mask is None else loss_mask
    # Undoes / (N T_i): what is left is A_i / N.
    share_RL = advantages * mask_RL.sum(dim=-1, keepdim=True)
    terms_RL, stats = padded_token_loss(objective, log_probs, mask_RL, share_RL)
    return terms_RL.sum(), figures(stats, ["zero_advantage_fraction"])


def register(nll_floor: float = ASymPO.nll_floor, negative_scale: float = SPO.negative_scale) -> None:
    """Register ``asympo`` and ``asympo_spo`` with SkyRL, on the driver, before ``validate_cfg``.

    Raises:
        IntegrationError: SkyRL's hook has changed, or a name is taken.
    """
    _check_hook()
    ppo_utils.repopulate_all_registries()
    for name, objective in {
        "asympo": ASymPO(nll_floor=nll_floor),
        "asympo_spo": SPO(negative_scale=negative_scale),
    }.items():
        require_no_behavior_data(objective)
        try:
            ppo_utils.PolicyLossRegistry.register(name, functools.partial(policy_loss, objective=objective))
        except ValueError as error:
            raise IntegrationError(f"skyrl did not take the policy loss {name!r}: {error}. Register once.") from error


def main() -> None:
    """SkyRL's own entry point with our losses and without the forward pass for old log-probs."""
    from skyrl.train.config import SkyRLTrainConfig
    from skyrl.train.utils import validate_cfg
    from skyrl.train.utils.utils import initialize_ray

    if "asympo" not in ppo_utils.PolicyLossRegistry.list_available():
        register()
    arguments = [part for part in sys.argv[1:] if not part.startswith("trainer.override_entrypoint=")]
    cfg = SkyRLTrainConfig.from_cli_overrides(arguments)
    validate_cfg(cfg)
    initialize_ray(cfg)
    ppo_utils.sync_registries()
    ray.get(_run.remote(cfg))


@ray.remote(num_cpus=1)
def _run(cfg: Any) -> None:
    from skyrl.train.entrypoints.main_base import BasePPOExp

    class Experiment(BasePPOExp):
        def get_trainer(self, *args: Any, **kwargs: Any) -> Any:
            trainer = super().get_trainer(*args, **kwargs)
            if not hasattr(trainer, "_skip_policy_forward"):
                raise IntegrationError("skyrl's trainer has no _skip_policy_forward. Install skyrl 0.3.0.")
            trainer._skip_policy_forward = functools.partial(skip_policy_forward, trainer)
            return trainer

    Experiment(cfg).run()


def skip_policy_forward(trainer: Any, training_input: Any) -> bool:
    """Whether nothing reads the old log-probs: no KL in the reward, no correction (which our loss refuses)."""
    algorithm = trainer.cfg.trainer.algorithm
    return not algorithm.use_kl_in_reward and not off_policy_correction_enabled(algorithm.off_policy_correction)


def _check_hook() -> None:
    """SkyRL's functions still mean what the loss relies on.

    Raises:
        IntegrationError: they do not.
    """
    expected = ["log_probs", "old_log_probs", "advantages", "config", "loss_mask", "rollout_logprobs"]
    given = list(inspect.signature(ppo_utils.ppo_policy_loss).parameters)
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    got = ppo_utils.apply_loss_reduction_to_advantages_minibatch(
        advantages=torch.full((2, 2), 8.0), loss_mask=mask, loss_reduction=_REDUCTION, micro_batch_size=1, max_seq_len=9
    )
    if given != expected or got.tolist() != [[2.0, 2.0], [4.0, 4.0]]:
        raise IntegrationError(
            f"skyrl's policy losses take {given} and {_REDUCTION} gave {got.tolist()}; 0.3.0 has {expected} and "
            "divides by responses x tokens. Install skyrl 0.3.0."
        )
