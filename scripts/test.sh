#!/usr/bin/env bash
# scripts/test.sh [PYTEST ARGUMENT ...]: lint, type check and every test; the last line is pytest's summary.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/venv.sh
ensure_venv "[dev]"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false RAY_USAGE_STATS_ENABLED=0
.venv/bin/python -m ruff check .
.venv/bin/python -m mypy --strict engine/ cluster/
if [ "$#" -gt 0 ]; then
    exec .venv/bin/python -m pytest "$@"
fi
# Tests that start Ray have the machine to themselves; the others share it.
status=0
.venv/bin/python -m pytest -q -n 2 -m "not ray and not serve" || status=$?
mapfile -t files < <(grep -rlE 'mark\.(ray|serve)\b' tests --include='test_*.py' | sort)  # to import no others
.venv/bin/python -m pytest -q -m "ray or serve" "${files[@]}" || status=$?
exit "$status"
