#!/usr/bin/env bash
# The mirror of this host's engines, where sync.deltas publishes changes:  mirror.sh [a.b=c ...]
# One for a host, however many engines it has, on MIRROR_PORT (settings.sh).
set -euo pipefail
# shellcheck source=examples/bare/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

if [[ -z $MIRROR_PORT ]]; then
  echo "set MIRROR_PORT, on all hosts the same: the controller asks for the mirrors there" >&2
  exit 2
fi
exec "$ASYMPO" mirror "$CONFIG" "sync.mirror_host=$BIND" "${COMMON[@]}" "$@"
