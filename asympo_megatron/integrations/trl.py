"""TRL: ``from asympo_megatron.integrations.trl import AsympoGRPOTrainer as GRPOTrainer``.

Checked against trl 1.16.0 (``trainer/grpo_trainer.py``). For AsyncGRPOTrainer see ``integrations.trl_async``.

The loss is replaced and nothing else. TRL's default ``loss_type="dapo"`` divides by tokens, which undoes the balance
between responses; here the divisor is the number of responses of the optimizer step, over micro-batches and ranks.
``loss_type``, ``epsilon``, ``delta`` and ``importance_sampling_level`` are not read. What cannot be combined with the
objective raises an error that names the flag.

What it saves: ``vllm_importance_sampling_correction=False`` (required here with vLLM) drops the old-log-prob forward
pass that TRL otherwise runs for every generation batch. Without vLLM it also runs when ``gradient_accumulation_steps``
is no multiple of ``steps_per_generation * num_iterations``; the defaults are. vLLM still returns the log-prob of each
sampled token: no flag turns that off.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from asympo_megatron.errors import ConfigError, IntegrationError
from asympo_megatron.integrations.padded import FIGURES, padded_token_loss, require_no_behavior_data, require_off
from asympo_megatron.objectives import ASymPO, Objective
from asympo_megatron.parallel import Stat

try:
    from trl import GRPOTrainer
except ImportError as error:
    raise IntegrationError(f"trl has no trainer where 1.16.0 has it: {error}. Install trl 1.16.0.") from error

_VISION = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)
"""Further inputs of the model that TRL's own loss passes on."""

_OFF = {
    "beta": 0.0,
    "top_entropy_quantile": 1.0,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "off_policy_mask_threshold": None,
}
"""Terms of TRL's loss that this one does not have, and the value that leaves them out."""


class AsympoGRPOTrainer(GRPOTrainer):
    """GRPOTrainer with one of our objectives.

    Args:
        *args, **kwargs: as GRPOTrainer.
        objective: default ``ASymPO()``.

    Raises:
        ConfigError: a setting that this loss does not have; the message names it.
    """

    def __init__(self, *args: Any, objective: Objective | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.objective = ASymPO() if objective is None else objective
        require_no_behavior_data(self.objective)
        require_off(self.args, _OFF)
        if hasattr(self, "compute_liger_loss") and self.args.use_liger_kernel:
            raise ConfigError(
                "use_liger_kernel is True: this version of trl would compute Liger's GRPO loss, not the objective. "
                "Set use_liger_kernel=False, or install trl 1.16.0, where it exchanges layers alone."
            )
        if self.args.use_vllm and self.args.vllm_importance_sampling_correction:
            raise ConfigError(
                "vllm_importance_sampling_correction costs a forward pass whose result this loss does not read. Set "
                "vllm_importance_sampling_correction=False."
            )

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        ids, mask = inputs["completion_ids"], inputs["completion_mask"]
        logprob_RL, entropy_RL, aux_loss = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], ids], dim=1),
            torch.cat([inputs["prompt_mask"], mask], dim=1),
            ids.size(1),
            compute_entropy=True,
            compute_aux_loss=self.aux_loss_enabled,
            **{name: inputs.get(name) for name in _VISION},
        )
        mask_RL = mask * inputs["tool_mask"] if "tool_mask" in inputs else mask
        terms_RL, stats = padded_token_loss(self.objective, logprob_RL, mask_RL, inputs["advantages"])
        mode = "train" if self.model.training else "eval"
        # Every micro-batch has equally many rows, so dividing by rows and micro-batches divides by N.
        microbatches = self.current_gradient_accumulation_steps if mode == "train" else 1
        loss = terms_RL.sum() / len(ids) / microbatches
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * aux_loss / microbatches
        self._log_objective(mode, (entropy_RL * mask_RL).sum(), mask_RL.sum(), stats)
        return loss

    @torch.no_grad()
    def _log_objective(self, mode: str, entropy: Tensor, tokens: Tensor, stats: Mapping[str, Stat]) -> None:
        """Means over ranks, which hold equally many rows: one all-reduce and one copy from the device."""
        names = [name for name in FIGURES if name in stats]
        mine = torch.cat([torch.stack([entropy, tokens]).double(), *(stats[name].values_K for name in names)])
        sums = self.accelerator.reduce(mine, reduction="mean").tolist()
        self._metrics[mode]["entropy"].append(sums[0] / max(sums[1], 1.0))
        for name, total, count in zip(names, sums[2::2], sums[3::2], strict=True):
            self._metrics[mode][f"{self.objective.name}/{name}"].append(total / count)


def _check_hooks() -> None:
    """TRL's methods still take what is passed to them here.

    Raises:
        IntegrationError: they do not.
    """
    for method, used in (
        (GRPOTrainer._compute_loss, {"model", "inputs"}),
        (GRPOTrainer._get_per_token_logps_and_entropies, {"compute_entropy", "compute_aux_loss", *_VISION}),
    ):
        missing = used - inspect.signature(method).parameters.keys()
        if missing:
            names = ", ".join(sorted(missing))
            raise IntegrationError(f"trl's {method.__qualname__} takes no {names}. Install trl 1.16.0.")


_check_hooks()
