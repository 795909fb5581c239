#!/usr/bin/env bash
# SkyRL 0.3 with ASymPO. The entry point registers the loss and drops the forward pass for old log-probs.
set -euo pipefail
exec python -m skyrl.train.entrypoints.main_base \
  trainer.override_entrypoint=asympo_megatron.integrations.skyrl \
  trainer.algorithm.policy_loss_type=asympo \
  trainer.algorithm.loss_reduction=sequence_mean \
  trainer.algorithm.advantage_estimator=grpo \
  trainer.algorithm.grpo_norm_by_std=false \
  trainer.algorithm.use_kl_loss=false \
  generator.sampling_params.logprobs=null \
  generator.n_samples_per_prompt=8 \
  trainer.policy.model.path="${MODEL:?the Hugging Face directory of the policy}" \
  data.train_data="['${TRAIN:?a parquet file of prompts}']" \
  "$@"
