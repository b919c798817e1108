#!/usr/bin/env bash
# Train all networks on word-level Penn Treebank with the same number of parameters (presets `small`, 3.21M within 1 %) for
# about the same time, and print the finished runs as a table. A short measurement finds the faster precision for each
# network on this machine, and the number of epochs that fit; the learning rate is divided by 10 after two thirds and after
# eight ninths of them, rounded down (at most once in three epochs or fewer). Started again, the script goes on where it
# stopped, with the same choices. See tables.sh for SEEDS, ROWS, SMOKE and ARGS.
#
#   MINUTES=60      minutes of training for each network
. "$(dirname "${BASH_SOURCE[0]}")/tables.sh"

check MINUTES '[1-9][0-9]*' "a number of minutes, 1 or more"
MINUTES="${MINUTES:-60}"
TABLE="compare-$MINUTES-minutes"
PROBE=300 # updates of the measurement; the first ones are faster than later ones

# budget FLAGS...: print the number of epochs that fit into MINUTES, and the faster precision; measured once per row.
budget() {
    local folder="$ROOT/runs/tables/$TABLE/$ROW_NAME" precision
    if [ ! -s "$folder/budget" ]; then
        read -ra more <<<"${ARGS:-}"
        for precision in fp32 bf16; do
            "$PY" "$ROOT/word_ptb/train.py" "$@" ${more[@]+"${more[@]}"} --precision "$precision" --max_steps "$PROBE" \
                --max_eval_tokens 1 --overwrite --out "$folder/probe-$precision" >&2
        done
        "$PY" - "$folder" "$MINUTES" >"$folder/budget" <<'PYTHON'
import json, pathlib, sys

folder, minutes, found = pathlib.Path(sys.argv[1]), float(sys.argv[2]), []
for precision in ("fp32", "bf16"):
    probe = folder / f"probe-{precision}"
    steps = json.loads((probe / "config.json").read_text())["steps an epoch"]
    records = map(json.loads, (probe / "metrics.jsonl").read_text().splitlines())
    last = [r for r in records if r["event"] == "epoch"][-1]
    # Validation takes a third of an update's time for a window, and the validation text is a twelfth of the training text.
    found.append((last["train_seconds"] / last["step"] * steps * (1 + 1 / 36), precision))
epoch, precision = min(found)
print(max(1, round(60 * minutes / epoch)), precision)
PYTHON
    fi
    cat "$folder/budget"
}

# timed MODEL: train the row that calls it for MINUTES.
timed() {
    local ROW_NAME="${FUNCNAME[1]}" n=3 precision=fp32
    [ -n "${SMOKE:-}" ] || read -r n precision <<<"$(budget --model "$1" --preset small)"
    train word_ptb --model "$1" --preset small --precision "$precision" --epochs "$n" --when $((2 * n / 3)) $((8 * n / 9))
}

trellisnet() { timed trellisnet; }
awd_lstm() { timed awd-lstm; }
tcn() { timed tcn; }
rhn() { timed rhn; }
sparse_lstm() { timed sparse-lstm; }

rows trellisnet awd_lstm tcn rhn sparse_lstm
[ -n "${SMOKE:-}" ] || "$PY" "$ROOT/scripts/collect.py" --table compare --root "$ROOT"
