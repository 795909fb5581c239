#!/usr/bin/env bash
# The trainer's ranks of this host:  trainer.sh CONTROLLER_URL NNODES NODE_RANK MASTER_HOST GPUS_PER_NODE [a.b=c ...]
# Start it once on every training host; NODE_RANK counts from 0, and MASTER_HOST is the host of rank 0. On SIGTERM or
# SIGUSR1 the ranks finish their step, save and end with 75: the same command then resumes the run.
set -euo pipefail
# shellcheck source=examples/bare/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

usage="usage: trainer.sh CONTROLLER_URL NNODES NODE_RANK MASTER_HOST GPUS_PER_NODE [a.b=c ...]"
url=${1:?$usage} nnodes=${2:?$usage} node_rank=${3:?$usage} master=${4:?$usage} per_node=${5:?$usage}

# Rank 0 is on MASTER_HOST: with sync.transport=collective, controller and engines reach its weights there.
exec "$PYTHON" -m asympo_megatron.launch.ranks --nnodes="$nnodes" --node-rank="$node_rank" \
  --nproc-per-node="$per_node" --master-addr="$master" --master-port="${MASTER_PORT:-29500}" \
  -m asympo_megatron.cli.main train "$CONFIG" "rollout.controller_url=$url" "sync.host=$master" \
  "${COMMON[@]}" "${@:6}"
