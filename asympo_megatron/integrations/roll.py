"""ROLL: ``actor_train.worker_cls: asympo_megatron.integrations.roll.ASymPOWorker`` in the YAML of an RLVR run.

Checked against ROLL v0.3.0-9-g8eb27cc of 2026-08-19 (``roll/pipeline/{base_worker.py,rlvr/actor_pg_worker.py}``,
``roll/distributed/strategy/{strategy,megatron_strategy}.py``, ``roll/utils/functionals.py``).

``loss_func(data, output_tensor)`` sees padded ``[B, T - 1]`` tensors, gathered over context parallelism, also where
sequences are packed (then one a call). It returns a sum divided by counts of the global mini-batch; the strategy
multiplies by micro-batches x DP (``apply_loss_scale``), which Megatron's averaging undoes. N is
``global_valid_samples["default"]``, the rows of the mini-batch, those without a trained token included; ``agg_loss``
would leave those out, so it is not used, and ``loss_agg_mode`` has no effect on the gradient.

What it saves: ``force_disable_old_logprobs_recompute: true`` and ``enable_reference: false`` skip both log-prob passes.
Log-probs of the engine are not read.

Options: a subclass with another objective, named in ``worker_cls``::

    class Floor(ASymPOWorker):
        objective = build_objective("asympo", nll_floor=0.1)
"""

from typing import Any, ClassVar

from roll.pipeline.rlvr.actor_pg_worker import ActorPGWorker
from torch import Tensor

from asympo_megatron.errors import ConfigError
from asympo_megatron.integrations.broadcast import gather_responses, padded_ids
from asympo_megatron.integrations.padded import require_off
from asympo_megatron.objectives import Objective, build_objective

_SOURCES = {
    "behavior_logprob_T": "infer_logprobs",
    "proximal_logprob_T": "old_log_probs",
    "reference_logprob_T": "ref_log_probs",
}

_OFF = {
    "use_kl_loss": False,
    "entropy_loss_coef": 0,
    "difficulty_loss_weight": False,
    "length_loss_weight": False,
    "whiten_advantages": False,
}
"""Options of the pipeline that the objective does not have, and the value that switches each off."""


class ASymPOWorker(ActorPGWorker):
    """ROLL's policy-gradient worker with one of our objectives in place of its losses."""

    objective: ClassVar[Objective] = build_objective("asympo")

    def loss_func(self, data: Any, output_tensor: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Sum over the responses of the micro-batch divided by N, and figures to be added up.

        Args:
            data: ``response_mask`` [B, T], ``advantages`` [B, T - 1] and, after filters, ``final_response_mask``
                [B, T - 1] in ``batch``; counts in ``meta_info``.
            output_tensor: logits of this rank.

        Raises:
            ConfigError: an option that would be ignored or change the scale; the message names it.
            BatchError: advantages differ inside a response.
        """
        self._check()
        batch, mask_key = data.batch, "response_mask"
        mask_RL = batch["response_mask"][:, 1:]
        if batch.get("final_response_mask", None) is not None:
            mask_RL, mask_key = batch["final_response_mask"], "final_response_mask"
        log_probs = self.strategy.op_compute_log_probs(
            logits=output_tensor, input_ids=batch["input_ids"], attention_mask=batch["response_mask"]
        )
        ids_T = padded_ids(mask_RL)
        needed = {name: batch[_SOURCES[name]].flatten().float() for name in self.objective.needs}
        responses = gather_responses(batch["advantages"].flatten().float(), ids_T, mask_RL.shape[0], **needed)
        out = self.objective(-log_probs.flatten(), responses)
        if self.objective.normalizer == "tokens":
            total = data.meta_info["batch_num_tokens"][mask_key]
        else:
            total = data.meta_info["global_valid_samples"]["default"]
        loss = out.loss_sum / total * self.pipeline_config.rl_loss_coef
        figures = {
            "actor/pg_loss@sum": float(out.loss_sum.detach() / total),
            "actor/total_loss@sum": float(loss.detach()),
        }
        if "J" in out.metrics:
            figures["actor/J@sum"] = float(out.metrics["J"].values_K[0] / total)
        return loss, figures

    def _check(self) -> None:
        config = self.pipeline_config
        require_off(config, _OFF)
        if config.train_infer_correction.is_weight.enabled or config.train_infer_correction.filters:
            raise ConfigError(
                "train_infer_correction corrects for the behavior policy, which the objective does not need. Remove it."
            )
        if not self.worker_config.apply_loss_scale:
            raise ConfigError(
                "actor_train.apply_loss_scale is false: Megatron would divide the loss by the micro-batches once more. "
                "Set it to true."
            )
