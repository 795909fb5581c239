"""AReaL: ``AsympoPPOTrainer`` and ``AsympoGRPOConfig`` instead of ``PPOTrainer`` and ``GRPOConfig`` in the script.

Checked against areal 1.0.4 (``trainer/ppo/actor.py``, ``trainer/rl_trainer.py``, ``engine/fsdp_engine.py``,
``engine/megatron_engine.py``, ``engine/core/train_engine.py``).

The engine calls the loss with packed [T] log-probs of whole sequences (reassembled under context parallelism), weighs
each micro-batch with ``loss_weight_fn`` and divides by the sum of the weights over all ranks. AReaL's weight is the
number of trained tokens; here it is the number of responses: the result is the sum over responses divided by N.

What it saves: ``actor.recompute_logprob=false`` and ``actor.use_decoupled_loss=false`` (both required here, both
defaults) drop the forward pass for old or proximal log-probs. AReaL asks SGLang for log-probs whatever the flags, and
its advantage computation takes its shapes from them.
"""

import inspect
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from asympo_megatron.batch import UNTRAINED
from asympo_megatron.errors import BatchError, ConfigError, IntegrationError
from asympo_megatron.integrations.broadcast import gather_responses
from asympo_megatron.integrations.padded import figures, require_no_behavior_data, require_off
from asympo_megatron.objectives import Objective, build_objective

try:
    from areal import PPOTrainer
    from areal.api.cli_args import GRPOConfig, PPOActorConfig
    from areal.engine.core import train_engine
    from areal.engine.fsdp_engine import FSDPPPOActor
    from areal.trainer.ppo.actor import PPOActor
    from areal.utils import stats_tracker
    from areal.utils.environ import is_single_controller
except ImportError as error:
    raise IntegrationError(f"areal has no class where 1.0.4 has it: {error}. Install areal 1.0.4.") from error
_TAKEN = inspect.signature(FSDPPPOActor.train_batch).parameters.keys()
if not {"input_", "loss_fn", "loss_weight_fn"} <= _TAKEN or not hasattr(train_engine, "compute_total_loss_weight"):
    raise IntegrationError(f"areal's train_batch takes {sorted(_TAKEN)}. Install areal 1.0.4.")

_OFF = {
    "use_decoupled_loss": False,
    "recompute_logprob": False,
    "use_sapo_loss": False,
    "m2_threshold": None,
    "rejection_sampling": None,
    "adv_norm": None,
    "mask_no_eos_with_zero": False,
    "kl_ctl": 0.0,
    "discount": 1.0,
    "gae_lambda": 1.0,
}
"""Settings that cost a forward pass nobody reads, that this loss has no term for, that give the tokens of one response
different advantages, or that set centred rewards to 0; with the value that is needed."""


@dataclass
class AsympoActorConfig(PPOActorConfig):
    """AReaL's ``actor`` section with an objective."""

    kl_ctl: float = field(default=0.0, metadata={"help": "must be 0: a KL penalty differs from token to token"})
    objective: str = field(default="asympo", metadata={"help": "asympo | asympo_spo | reinforce | pkg.mod:Class"})
    objective_options: dict[str, Any] = field(default_factory=dict, metadata={"help": "options of the objective"})


@dataclass
class AsympoGRPOConfig(GRPOConfig):
    """AReaL's experiment config whose actor section knows the objective."""

    actor: AsympoActorConfig = field(default_factory=AsympoActorConfig)


class AsympoPPOActor(PPOActor):
    """AReaL's actor with an objective; ConfigError names a setting that this loss has no use for."""

    def __init__(self, config: AsympoActorConfig, engine: Any) -> None:
        require_off(config, _OFF, "actor.")
        norm = config.reward_norm
        if norm is None or norm.mean_level != "group" or norm.group_size < 2:
            raise ConfigError(
                f"actor.reward_norm is {norm}: the advantages of a group do not sum to zero. Set "
                "actor.reward_norm.mean_level=group and actor.reward_norm.group_size=gconfig.n_samples, 2 or more."
            )
        self.objective = build_objective(config.objective, **config.objective_options)
        require_no_behavior_data(self.objective)
        super().__init__(config, engine)

    def _compute_advantages(self, data: dict[str, Any]) -> dict[str, Any]:
        """AReaL carries the reward back from the last position and loses it where that token is untrained."""
        data = super()._compute_advantages(data)
        data["advantages"] = data["tot_rewards"].sum(dim=-1, keepdim=True) * data["loss_mask"]
        return data


class AsympoFSDPPPOActor(FSDPPPOActor):
    """AReaL's FSDP engine, which trains with our loss and weight instead of those handed in."""

    def __init__(self, config: AsympoActorConfig) -> None:
        super().__init__(config)
        self.actor = AsympoPPOActor(config, self)

    def train_batch(self, input_: Any, loss_fn: Any, loss_weight_fn: Any) -> dict[str, float]:
        return super().train_batch(input_, partial(asympo_loss, self.actor.objective), count_responses)


class AsympoPPOTrainer(PPOTrainer):
    """AReaL's trainer with :class:`AsympoFSDPPPOActor` (``actor.backend`` fsdp)."""

    def _create_train_engine(self, actor_config: Any, alloc: Any) -> Any:
        if not isinstance(actor_config, AsympoActorConfig):
            return super()._create_train_engine(actor_config, alloc)  # reference or teacher model
        if alloc.backend != "fsdp":
            raise ConfigError(f"actor.backend is {alloc.backend!r}; this adapter has the fsdp engine only.")
        if is_single_controller():
            actor = AsympoFSDPPPOActor.as_controller(actor_config, self.scheduler)
        else:
            actor = AsympoFSDPPPOActor(config=actor_config)
        actor.create_process_group(parallel_strategy=alloc.parallel)
        return actor


def count_responses(input_data: dict[str, Any]) -> Tensor:
    """``loss_weight_fn``: responses of a micro-batch, masked ones included."""
    boundaries = input_data["cu_seqlens"]
    return torch.tensor(boundaries.numel() - 1, device=boundaries.device)


def asympo_loss(
    objective: Objective, logprobs: Tensor, entropy: Tensor, input_data: dict[str, Any], **_: Tensor
) -> Tensor:
    """Mean over the responses of a packed micro-batch; the engine weighs it with :func:`count_responses`.

    Raises:
        BatchError: the micro-batch is not packed, carries teacher log-probs, or has per-token advantages.
    """
    boundaries, mask_T = input_data.get("cu_seqlens"), input_data["loss_mask"].bool()
    if boundaries is None or logprobs.shape != mask_T.shape:
        raise BatchError(f"not a packed micro-batch: {tuple(logprobs.shape)}, {boundaries}. Turn tree training off.")
    if input_data.get("teacher_logp") is not None:
        raise BatchError("the micro-batch has teacher log-probs; this loss has no distillation term. Unset teacher.")
    length_R = boundaries.diff().long()
    row_R = torch.arange(len(length_R), device=mask_T.device)
    row_T = torch.repeat_interleave(row_R, length_R, output_size=mask_T.numel())  # or the host waits for the lengths
    batch = gather_responses(input_data["advantages"], torch.where(mask_T, row_T, UNTRAINED), len(length_R))
    out = objective(-logprobs, batch)
    stats_tracker.denominator(n_valid_tokens=mask_T)
    stats_tracker.stat(entropy=entropy.detach().float(), new_logp=logprobs.detach(), denominator="n_valid_tokens")
    stats_tracker.scalar(**{f"{objective.name}_{name}": value for name, value in figures(out.metrics).items()})
    return out.loss_sum / out.normalizer_count
