#!/bin/sh
# For RAY_SERVE_HAPROXY_BINARY_PATH: the haproxy that comes with ray[serve], as haproxy.py changes it and says why.
root=$(cd "$(dirname "$0")/.." && pwd)
python=${MANTA_PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || python=python3
exec "$python" "$root/scripts/haproxy.py" "$@"
