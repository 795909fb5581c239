#!/usr/bin/env bash
# One engine on this host, as rollout.engine of CONFIG says:  engine.sh PORT [GPU,GPU,... [a.b=c ...]]
# SGLang is tensor parallel over the GPUs named. Start as many as there are groups of GPUs, each on its own port.
set -euo pipefail
# shellcheck source=examples/bare/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

port=${1:?usage: engine.sh PORT [GPU,GPU,... [a.b=c ...]]}
export CUDA_VISIBLE_DEVICES=${2:-0}
commas=${CUDA_VISIBLE_DEVICES//[^,]/}

# SGLang counts from the first GPU that it sees; rollout.engine_args may name those that `asympo run` leaves to engines.
exec "$ASYMPO" engine "$CONFIG" "rollout.engine_host=$BIND" "rollout.engine_port=$port" \
  ${SGLANG_PYTHON:+"rollout.engine_python=$SGLANG_PYTHON"} "${COMMON[@]}" "${@:3}" \
  --engine-args --base-gpu-id 0 --tp-size $((${#commas} + 1))
