#!/usr/bin/env bash
# Check style and run the tests. usage: bash scripts/test.sh [any argument of pytest]
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
use_venv dev

cd "$ROOT"
"$PY" -m ruff check .
"$PY" -m ruff format --check .
# One process per core, each with one thread: the tests are many and small.
OMP_NUM_THREADS=1 "$PY" -m pytest -q -n auto --maxprocesses 8 --dist worksteal "$@"
