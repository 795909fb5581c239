# Settings that all roles share. Edit them here, or set them in the environment. Sourced by the scripts beside it.
# shellcheck shell=bash

# Run every script from the same directory on a file system that all hosts share: weights travel through runs/.
: "${CONFIG:=examples/configs/qwen3_1p7b_math.yaml}"
: "${ASYMPO:=.venv/bin/asympo}"
: "${PYTHON:=.venv/bin/python}"

# SGLang needs an environment of its own: path of its Python. Empty: rollout.engine_python of CONFIG.
: "${SGLANG_PYTHON:=}"

# Address that servers listen on. Anything but loopback opens them to the network: keep it a private one, and set
# ASYMPO_TOKEN (controller) and ASYMPO_ENGINE_KEY (engines), the same on all hosts.
: "${BIND:=127.0.0.1}"
: "${CONTROLLER_PORT:=8700}"
case $BIND in
  127.* | localhost | ::1) ;;
  *)
    if [[ -z "${ASYMPO_TOKEN:-}" || -z "${ASYMPO_ENGINE_KEY:-}" ]]; then
      echo "BIND=$BIND opens the servers to the network: set ASYMPO_TOKEN and ASYMPO_ENGINE_KEY." >&2
      exit 2
    fi
    ;;
esac

# sync.deltas > 0: port of mirror.sh on every engine host, the same everywhere.
: "${MIRROR_PORT:=}"

# Overrides that every role gets: those of OVERRIDES, one a line, and ours.
COMMON=()
if [[ -n "${OVERRIDES:-}" ]]; then
  mapfile -t COMMON <<<"$OVERRIDES"
fi
if [[ -n $MIRROR_PORT ]]; then
  COMMON+=("sync.mirror_port=$MIRROR_PORT")
fi
if [[ -n "${RUN_NAME:-}" ]]; then
  COMMON+=("run.name=$RUN_NAME")
fi
# Secrets come from the environment, so that no command line shows them (`asympo engine` hands SGLang its key in a file).
# Both may stay unset on loopback.
if [[ -n "${ASYMPO_TOKEN:-}" ]]; then
  export ASYMPO_TOKEN
  # shellcheck disable=SC2016 # resolved by the configuration, not by the shell
  COMMON+=('rollout.controller_token=${oc.env:ASYMPO_TOKEN}')
fi
if [[ -n "${ASYMPO_ENGINE_KEY:-}" ]]; then
  export ASYMPO_ENGINE_KEY
  # shellcheck disable=SC2016
  COMMON+=('rollout.engine_api_key=${oc.env:ASYMPO_ENGINE_KEY}')
fi
