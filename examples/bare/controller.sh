#!/usr/bin/env bash
# The controller, on one host without a GPU to spare:  controller.sh ENGINE_URL...
set -euo pipefail
# shellcheck source=examples/bare/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

if (($# == 0)); then
  echo "usage: controller.sh http://HOST:PORT [http://HOST:PORT ...]" >&2
  exit 2
fi
urls=$(
  IFS=,
  echo "$*"
)
exec "$ASYMPO" control "$CONFIG" "rollout.engine_urls=[$urls]" \
  "rollout.controller_host=$BIND" "rollout.controller_port=$CONTROLLER_PORT" \
  ${JOURNAL_DIR:+"rollout.journal_dir=$JOURNAL_DIR"} "${COMMON[@]}"
