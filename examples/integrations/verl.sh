#!/usr/bin/env bash
# verl 0.9 with ASymPO. `pip install asympo-megatron` beside verl registers the loss; the first override selects it.
set -euo pipefail
exec python -m verl.trainer.main_ppo \
  actor_rollout_ref.actor.policy_loss.loss_mode=asympo \
  actor_rollout_ref.actor.policy_loss._target_=asympo_megatron.integrations.verl.AsympoPolicyLossConfig \
  +actor_rollout_ref.actor.policy_loss.nll_floor=1e-3 \
  algorithm.adv_estimator=grpo \
  algorithm.norm_adv_by_std_in_grpo=False \
  algorithm.rollout_correction.bypass_mode=True \
  actor_rollout_ref.rollout.calculate_log_probs=True \
  actor_rollout_ref.rollout.n=8 \
  actor_rollout_ref.model.path="${MODEL:?the Hugging Face directory of the policy}" \
  data.train_files="${TRAIN:?a parquet file of prompts}" \
  data.val_files="${VALIDATION:-$TRAIN}" \
  "$@"
