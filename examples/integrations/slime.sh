#!/usr/bin/env bash
# slime with ASymPO: these flags beside those of your run. No log-prob forward pass, no reference model.
set -euo pipefail
exec python train.py \
  --loss-type custom_loss \
  --custom-loss-function-path asympo_megatron.integrations.slime.asympo_loss \
  --custom-config-path "${ASYMPO_CONFIG:?a copy of slime_miles_asympo.yaml}" \
  --disable-compute-advantages-and-returns \
  --rollout-data-postprocess-path asympo_megatron.integrations.slime.fill_advantages \
  --custom-reward-post-process-path asympo_megatron.integrations.slime.group_advantages \
  "$@"
