"""OpenRLHF: ``python -m asympo_megatron.integrations.openrlhf`` instead of ``python -m openrlhf.cli.train_ppo_ray``.

Checked against openrlhf 0.11.2 (``cli/train_ppo_ray.py``, ``trainer/ray/ppo_actor.py``,
``trainer/ppo_utils/experience_maker.py``, ``models/loss.py``, ``utils/loss_utils.py``).

OpenRLHF has no registry of losses, so ``main`` exchanges the Ray actor that holds the policy for one whose trainer has
our loss, and then runs OpenRLHF's own entry point. The loss gets padded [R, L] tensors of whole responses, also under
ring attention and with packed samples, and the counts of the optimizer step. The divisor is ``global_batch_size``: the
responses with a trained token over all micro-batches and ranks, whatever ``--actor.loss_agg_mode`` says (that still
holds for OpenRLHF's entropy and KL terms). A response without trained tokens is not in OpenRLHF's N.

Options: ``--asympo.objective`` (a name, an entry point, or ``package.module:Class``) and ``--asympo.options`` (JSON).

What it saves: the forward pass for old log-probs, which OpenRLHF otherwise runs for every rollout batch, whatever the
flags; zeros that nobody reads take their place. vLLM returns no log-probs: ``is_correction_level`` is off.
"""

import argparse
import inspect
import json
import runpy
import sys
from typing import Any

import torch
from torch import Tensor

from asympo_megatron.errors import BatchError, ConfigError, IntegrationError
from asympo_megatron.integrations.padded import padded_token_loss, require_no_behavior_data, require_off
from asympo_megatron.objectives import Objective, build_objective

try:
    import ray
    from openrlhf.models import PolicyLoss
    from openrlhf.trainer.ray import ppo_actor
except ImportError as error:
    raise IntegrationError(f"openrlhf has no module where 0.11.2 has it: {error}. Install openrlhf 0.11.2.") from error

_CENTRED = ("dr_grpo", "rloo", "group_norm")
"""Estimators whose advantages sum to zero in each group, and are not whitened over tokens afterwards."""


class ObjectiveLoss:
    """In the place of ``PolicyLoss``."""

    def __init__(self, objective: Objective) -> None:
        require_no_behavior_data(objective)
        self.objective = objective

    def __call__(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: Tensor | None = None,
        global_batch_size: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """(loss, clip ratio, KL, ...): the comparisons with other policies, which this loss does not make, are 0.

        Raises:
            BatchError: no global batch size, or advantages that differ inside a response.
        """
        terms_RL, _ = padded_token_loss(self.objective, log_probs, action_mask, advantages)
        if global_batch_size is None:
            raise BatchError("openrlhf handed over no global_batch_size, so micro-batches would not add up.")
        loss = terms_RL.sum() / global_batch_size * dp_size
        nothing = torch.zeros_like(loss, requires_grad=False)
        return loss, nothing, nothing, None, None


def check_settings(args: Any) -> None:
    """Refuse what this loss has no use for.

    Args:
        args: OpenRLHF's nested namespace.

    Raises:
        ConfigError: a setting; the message names it.
    """
    require_off(args.algo.advantage, {"is_correction_level": "off"}, "--algo.advantage.")
    require_off(args.algo.kl, {"unbiased_gradient": False}, "--algo.kl.")
    if args.algo.advantage.estimator not in _CENTRED:
        raise ConfigError(
            f"--algo.advantage.estimator is {args.algo.advantage.estimator!r}: the advantages of a group do not sum to "
            f"zero. Set one of {', '.join(_CENTRED)}; dr_grpo subtracts the group's mean."
        )
    if args.algo.kl.init_coef > 0 and not args.algo.kl.use_loss:
        raise ConfigError("a KL penalty in the reward differs from token to token. Set --algo.kl.init_coef 0.")


def policy_actor(objective: Objective) -> Any:
    """OpenRLHF's Ray actor of the policy, with ``objective`` as its loss and no pass for old log-probs."""
    loss = ObjectiveLoss(objective)

    class AsympoPolicyModelActor(ppo_actor.PolicyModelActor.__ray_actor_class__):  # type: ignore[misc,name-defined]
        def init_model_from_pretrained(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
            check_settings(strategy.args)
            super().init_model_from_pretrained(strategy, *args, **kwargs)
            self.trainer.actor_loss_fn = loss

        def forward(self, sequences: Tensor, action_mask: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """Old log-probs of a rollout batch: only their shape is used."""
            return torch.zeros(action_mask.shape)

    return ray.remote(num_gpus=1)(AsympoPolicyModelActor)


def main() -> None:
    """OpenRLHF's own entry point with our policy actor; other arguments are OpenRLHF's."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--asympo.objective", dest="objective", default="asympo")
    parser.add_argument("--asympo.options", dest="options", type=json.loads, default={})
    ours, sys.argv[1:] = parser.parse_known_args()
    _check_hook()
    ppo_actor.PolicyModelActor = policy_actor(build_objective(ours.objective, **ours.options))
    runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__", alter_sys=True)


def _check_hook() -> None:
    """OpenRLHF still calls its loss, and makes its trainer, as in 0.11.2.

    Raises:
        IntegrationError: it does not.
    """
    taken = list(inspect.signature(PolicyLoss.forward).parameters)[1:]
    if taken != list(inspect.signature(ObjectiveLoss.__call__).parameters)[1:]:
        raise IntegrationError(f"openrlhf's PolicyLoss takes {', '.join(taken)}. Install openrlhf 0.11.2.")
    if "self.actor_loss_fn = PolicyLoss(" not in inspect.getsource(ppo_actor.ActorPPOTrainer.__init__):
        raise IntegrationError("openrlhf's ActorPPOTrainer has no actor_loss_fn. Install openrlhf 0.11.2.")


if __name__ == "__main__":
    from asympo_megatron.integrations import openrlhf

    openrlhf.main()
