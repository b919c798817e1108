#!/usr/bin/env bash
# All networks on word-level Penn Treebank with the same number of parameters (presets `small`, 3.21M to 1 %) for about the
# same time. A short measurement says how many epochs each has time for on this machine; the rate is divided by 10 after two
# thirds and after eight ninths of them. Start it again and it goes on where it stopped, with the epochs that it had chosen.
# It prints the table of what is finished. See tables.sh for SEEDS, ROWS, SMOKE and ARGS.
#
#   MINUTES=60      of training for each network
. "$(dirname "${BASH_SOURCE[0]}")/tables.sh"

MINUTES="${MINUTES:-60}"
TABLE="compare-$MINUTES-minutes"
PROBE=100 # updates of the measurement

# epochs FLAGS...: how many epochs of word_ptb fit into MINUTES; measured once a row.
epochs() {
    local folder="$ROOT/runs/tables/$TABLE/$ROW_NAME"
    if [ ! -s "$folder/epochs" ]; then
        read -ra more <<<"${ARGS:-}"
        "$PY" "$ROOT/word_ptb/train.py" "$@" ${more[@]+"${more[@]}"} --max_steps "$PROBE" --max_eval_tokens 1 \
            --overwrite --out "$folder/probe" >&2
        "$PY" - "$folder/probe" "$MINUTES" >"$folder/epochs" <<'PYTHON'
import json, pathlib, sys

folder, minutes = pathlib.Path(sys.argv[1]), float(sys.argv[2])
steps = json.loads((folder / "config.json").read_text())["steps an epoch"]
records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
last = [r for r in records if r["event"] == "epoch"][-1]
# Validation takes a third of an update's time for a window, and the validation text is a twelfth of the training text.
epoch = last["train_seconds"] / last["step"] * steps * (1 + 1 / 36)
print(max(1, round(60 * minutes / epoch)))
PYTHON
    fi
    cat "$folder/epochs"
}

# timed MODEL: the row that calls it.
timed() {
    local ROW_NAME="${FUNCNAME[1]}" n=3
    [ -n "${SMOKE:-}" ] || n="$(epochs --model "$1" --preset small)"
    train word_ptb --model "$1" --preset small --epochs "$n" --when $((2 * n / 3)) $((8 * n / 9))
}

trellisnet() { timed trellisnet; }
awd_lstm() { timed awd-lstm; }
tcn() { timed tcn; }
rhn() { timed rhn; }
sparse_lstm() { timed sparse-lstm; }

rows trellisnet awd_lstm tcn rhn sparse_lstm
[ -n "${SMOKE:-}" ] || "$PY" "$ROOT/scripts/collect.py" --table compare
