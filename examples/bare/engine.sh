#!/usr/bin/env bash
# One engine on this host:  engine.sh PORT [GPU,GPU,...]
# Tensor parallel over the GPUs named. Start as many as there are groups of GPUs, each on its own port.
set -euo pipefail
# shellcheck source=examples/bare/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

port=${1:?usage: engine.sh PORT [GPU,GPU,...]}
gpus=${2:-0}

if [[ $ENGINE == embedded ]]; then
  exec "$ASYMPO" engine "$CONFIG" "rollout.engine_host=$BIND" "rollout.engine_port=$port" "${COMMON[@]}" "${@:3}"
fi

commas=${gpus//[^,]/}
key=()
if [[ -n "${ASYMPO_ENGINE_KEY:-}" ]]; then
  # In a file for its owner alone: every user of the host can read a command line.
  file=$PWD/runs/engine_keys/$(hostname)-$port.yaml
  mkdir -p "${file%/*}"
  rm -f "$file"
  quote="'" # YAML doubles it inside quotes
  (umask 077 && printf "api-key: '%s'\n" "${ASYMPO_ENGINE_KEY//$quote/$quote$quote}" >"$file")
  key=(--config "$file")
fi
export CUDA_VISIBLE_DEVICES=$gpus
# dummy: random weights. The trainer's first published version arrives before the first prompt.
exec "$SGLANG_PYTHON" -m sglang.launch_server --model-path "$MODEL" --load-format dummy \
  --dtype "$DTYPE" --host "$BIND" --port "$port" --tp-size $((${#commas} + 1)) --context-length "$CONTEXT_LENGTH" \
  "${key[@]}" "${@:3}"
