#!/usr/bin/env bash
# Start a Ray head that only this machine can reach, and stay in the foreground.
#
#   clusters/ray/start-local-head.sh [further `ray start` options, which win]
#
# Stop it with Ctrl-C, or SIGTERM to this process (never `ray stop`: it ends every Ray of the machine).
# Jobs are submitted to http://127.0.0.1:8265; see ../README.md.
set -euo pipefail

# 0 keeps every listener on 127.0.0.1 (ray 2.60; --node-ip-address=127.0.0.1 does not).
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0
export RAY_USAGE_STATS_ENABLED=0

# Other users of this machine reach the loopback too: they need the token in ~/.ray/auth_token
# (or RAY_AUTH_TOKEN_PATH). RAY_AUTH_MODE=disabled turns this off.
export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}"
if [ "$RAY_AUTH_MODE" = token ]; then
    # Readable by this user alone from its creation; one that an earlier version left open is closed.
    (umask 077 && ray get-auth-token --generate >/dev/null)
    token="${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}"
    if [ -z "${RAY_AUTH_TOKEN:-}" ] && [ -f "$token" ]; then
        chmod 600 "$token"
    fi
fi

exec ray start --head --block --disable-usage-stats \
    --port=6379 \
    --dashboard-host=127.0.0.1 --dashboard-port=8265 \
    --object-store-memory=200000000 \
    "$@"
