#!/usr/bin/env bash
# OpenRLHF 0.11 with ASymPO: our entry point instead of openrlhf.cli.train_ppo_ray. No pass for old log-probs.
set -euo pipefail
exec python -m asympo_megatron.integrations.openrlhf \
  --asympo.objective asympo \
  --asympo.options '{"nll_floor": 1e-3}' \
  --algo.advantage.estimator dr_grpo \
  --algo.kl.init_coef 0 \
  --rollout.n_samples_per_prompt 8 \
  --actor.model_name_or_path "${MODEL:?the Hugging Face directory of the policy}" \
  --data.prompt_dataset "${PROMPTS:?a data set of prompts}" \
  --reward.remote_url "${REWARD:?a Python file with the reward function}" \
  "$@"
