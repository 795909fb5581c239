#!/usr/bin/env bash
# miles with ASymPO: these flags beside those of your run. No log-prob forward pass.
set -euo pipefail
exec python train.py \
  --loss-type custom_loss \
  --custom-loss-function-path asympo_megatron.integrations.miles.asympo_loss \
  --custom-config-path "${ASYMPO_CONFIG:?a copy of slime_miles_asympo.yaml}" \
  --use-rollout-logprobs \
  --custom-reward-post-process-path asympo_megatron.integrations.miles.group_advantages \
  "$@"
