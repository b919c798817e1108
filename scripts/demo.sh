#!/usr/bin/env bash
# Train a tiny TrellisNet for a minute or two, print its perplexities, a sample of generated text, and commands to continue with.
# usage: bash scripts/demo.sh [--data DIR] [any flag of word_ptb/train.py]
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
use_venv ""

data=() synthetic=() out="$ROOT/runs/demo" flag=""
for word in "$@"; do # the user's choice of data and folder
    case "$flag$word" in
    --data=* | --data" "*) data=(--data "${word#--data=}") ;;
    --out=* | --out" "*) out="${word#--out=}" ;;
    -h | --help) exec "$PY" "$ROOT/word_ptb/train.py" --help ;;
    esac
    case "$word" in --data | --out) flag="$word " ;; *) flag="" ;; esac
done
if [ ${#data[@]} -eq 0 ]; then
    status=0
    echo "looking for Penn Treebank in data/penn"
    "$PY" -m word_ptb.data "$ROOT/data/penn" || status=$?
    [ "$status" -lt 128 ] || exit "$status" # a signal
    if [ "$status" -ne 0 ]; then
        echo "NOTICE: no Penn Treebank in data/penn (train.txt, valid.txt, test.txt), and it could not be fetched;"
        echo "NOTICE: training on a small synthetic corpus instead. Perplexities on it mean nothing elsewhere."
        synthetic=(--data synthetic)
    fi
fi
echo "training; the first lines take a few seconds"
"$PY" "$ROOT/word_ptb/train.py" --preset tiny --out "$out" --overwrite ${synthetic[@]+"${synthetic[@]}"} "$@"
[ -e "$out/weights.pkl" ] || exit 0

generate=("$ROOT/scripts/generate.py" --run "$out" --length 60)
printf '\nA sample of generated text:\n\n'
"$PY" "${generate[@]}" --temperature 0.8

# Print a command as it can be typed here.
show() { echo "   $(printf ' %q' "${@#"$PWD"/}")"; }
longer=("$ROOT/word_ptb/train.py" --preset small --precision bf16 --out "$ROOT/runs/longer")
longer+=(${data[@]+"${data[@]}"} ${synthetic[@]+"${synthetic[@]}"})
[ ! -e "$ROOT/runs/longer/last.pt" ] || longer+=(--resume)
printf '\nNext, activate the environment, generate more, or train longer (on Penn Treebank 42 minutes on two CPU cores\n'
printf 'with bfloat16 instructions; without them leave out --precision bf16):\n\n'
show . "$ROOT/.venv/bin/activate"
show python "${generate[@]}" --samples 3
show python "${longer[@]}"
