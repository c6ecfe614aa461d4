#!/usr/bin/env bash
# scripts/run.sh [CONFIG] [KEY=VALUE ...]: serve CONFIG (configs/tiny.yaml) on this machine; Ctrl-C ends all it started.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/venv.sh
ensure_venv
exec .venv/bin/python -m scripts.run "$@"
