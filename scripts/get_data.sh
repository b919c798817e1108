#!/usr/bin/env bash
# Fetch the data that are missing: Penn Treebank into data/penn. Files that are there are left alone.
# usage: bash scripts/get_data.sh [ptb]
set -euo pipefail

if [ $# -gt 1 ] || [ "${1:-ptb}" != ptb ]; then
    printf 'error: %s: no such data; usage: bash scripts/get_data.sh [ptb]\n' "$*" >&2
    exit 2
fi
. "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
use_venv ""

cd "$ROOT"
"$PY" -m word_ptb.data data/penn
