#!/usr/bin/env bash
# Train a tiny TrellisNet for a few minutes and print its perplexities.
# usage: bash scripts/demo.sh [--data DIR] [any flag of word_ptb/train.py]
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
use_venv ""

data=()
case " $* " in
*" --data "* | *" --data="*) ;; # the user's choice
*)
    status=0
    "$PY" -m word_ptb.data "$ROOT/data/penn" || status=$?
    [ "$status" -lt 128 ] || exit "$status" # a signal
    if [ "$status" -ne 0 ]; then
        echo "NOTICE: no Penn Treebank in data/penn (train.txt, valid.txt, test.txt), and it could not be fetched;"
        echo "NOTICE: training on a small synthetic corpus instead. Its perplexities mean nothing beyond it."
        data=(--data synthetic)
    fi
    ;;
esac
"$PY" "$ROOT/word_ptb/train.py" --preset tiny --out "$ROOT/runs/demo" --overwrite ${data[@]+"${data[@]}"} "$@"
