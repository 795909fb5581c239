#!/usr/bin/env bash
# Submits engines, controller and trainer as three jobs that find each other by URL, and one that ends what is left:
#
#   ENGINES=4 TRAIN_NODES=2 examples/slurm/submit.sh examples/configs/qwen3_1p7b_math.yaml RUN_NAME [a.b=c ...]
#
# Run it from the repository on a file system that all nodes share. Partition, account and the like: SBATCH_* variables.
set -euo pipefail

usage="usage: submit.sh CONFIG RUN_NAME [a.b=c ...]"
export CONFIG=${1:?$usage}
export RUN_NAME=${2:?$usage}
OVERRIDES=$(printf '%s\n' "${@:3}") # one a line, for every role
export OVERRIDES
export ENGINES=${ENGINES:-2}
export GPUS_PER_ENGINE=${GPUS_PER_ENGINE:-4}
export GPUS_PER_NODE=${GPUS_PER_NODE:-8}
export ROLES=$PWD/examples/bare
export BIND=0.0.0.0
# Secrets of this run, handed to the jobs in their environment: of the controller and of the engines.
secret() { od -An -N16 -tx1 /dev/urandom | tr -d ' \n'; }
export ASYMPO_TOKEN=${ASYMPO_TOKEN:-$(secret)}
export ASYMPO_ENGINE_KEY=${ASYMPO_ENGINE_KEY:-$(secret)}

export RENDEZVOUS=$PWD/runs/$RUN_NAME/slurm
mkdir -p "$RENDEZVOUS"
chmod 700 "$RENDEZVOUS" # SGLang prints its arguments, the key included, to its log
rm -f "$RENDEZVOUS"/*.url

here=$(dirname "${BASH_SOURCE[0]}")
logs=$RENDEZVOUS/%x-%j.log
engines=$(sbatch --parsable --array=0-$((ENGINES - 1)) --gpus="$GPUS_PER_ENGINE" --output="$RENDEZVOUS/%x-%A-%a.log" \
  "$here/engine.sbatch")
submitted=("$engines")
trap 'scancel "${submitted[@]}"' EXIT # all the jobs or none: those that Slurm took would wait for the others, on their GPUs
export ENGINES_JOB=$engines
controller=$(sbatch --parsable --output="$logs" "$here/controller.sbatch")
submitted+=("$controller")
export CONTROLLER_JOB=$controller SERVERS="$engines $controller"
trainer=$(sbatch --parsable --nodes="${TRAIN_NODES:-1}" --gpus-per-node="$GPUS_PER_NODE" --output="$logs" \
  "$here/trainer.sbatch")
submitted+=("$trainer")
# A trainer that is cancelled before it starts, or whose script is killed, stops no servers: this job does. It outlasts
# requeues, for slurmctld makes a requeued job pending at once, and afterany waits for a job that has finished.
sbatch --parsable --job-name=asympo-cleanup --dependency="afterany:$trainer" --ntasks=1 --time=5 --output="$logs" \
  --wrap="scancel --quiet $SERVERS || true" >/dev/null # those that ended by themselves are no failure
trap - EXIT
echo "engines $engines, controller $controller, trainer $trainer; logs in $RENDEZVOUS"
