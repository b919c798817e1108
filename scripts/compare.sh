#!/usr/bin/env bash
# Train all networks on word-level Penn Treebank with the same number of parameters (presets `small`, 3.21M within 1 %) for
# about the same time, and print the finished runs as a table. A short measurement finds the faster precision for each
# network on this machine, and the number of updates that fit; over these the learning rate falls to 0 along a cosine.
# Started again, the script continues where it stopped, with the same choices. See tables.sh for SEEDS, ROWS, SMOKE and ARGS.
#
#   MINUTES=60      minutes of training for each network
. "$(dirname "${BASH_SOURCE[0]}")/tables.sh"

check MINUTES '[1-9][0-9]*' "a number of minutes, 1 or more"
MINUTES="${MINUTES:-60}"
TABLE="compare-$MINUTES-minutes"
PROBE=300 # updates of the measurement; the first ones are faster than later ones

# In $(…) a failed command does not end the script, so these functions return at once.

# probe NAME FLAGS...: make PROBE updates, and print the seconds per update and the updates per epoch.
probe() {
    local out="$ROOT/runs/tables/$TABLE/$ROW_NAME/probe-$1"
    shift
    read -ra more <<<"${ARGS:-}"
    "$PY" "$ROOT/word_ptb/train.py" "$@" ${more[@]+"${more[@]}"} --max_steps "$PROBE" --max_eval_tokens 1 --overwrite \
        --out "$out" >&2 || return
    "$PY" - "$out" <<'PYTHON'
import json, pathlib, sys

folder = pathlib.Path(sys.argv[1])
records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
epochs = [r for r in records if r["event"] == "epoch"]
seconds = sum(r["train_seconds"] for r in epochs)
print(seconds / epochs[-1]["step"], json.loads((folder / "config.json").read_text())["steps an epoch"])
PYTHON
}

# budget LAYERS FLAGS...: print the updates that fit into MINUTES, the faster precision and, unless LAYERS is 0, how many
# epochs with so few layers take half of the time. Measured once per row.
budget() {
    local file="$ROOT/runs/tables/$TABLE/$ROW_NAME/budget" layers="$1" fp32 bf16 precision=fp32 shallow
    shift
    if [ ! -s "$file" ]; then
        fp32="$(probe fp32 "$@" --precision fp32)" || return
        bf16="$(probe bf16 "$@" --precision bf16)" || return
        if "$PY" -c 'import sys; sys.exit(not float(sys.argv[2]) < float(sys.argv[1]))' "${fp32% *}" "${bf16% *}"; then
            precision=bf16
        fi
        shallow="${!precision}"
        if [ "$layers" != 0 ]; then
            shallow="$(probe shallow "$@" --precision "$precision" --nlevels "$layers")" || return
        fi
        "$PY" - "$MINUTES" "$precision" "$layers" ${!precision} "${shallow% *}" >"$file" <<'PYTHON' || return
import sys

minutes, precision, layers, update, epoch, shallow = sys.argv[1:]
# Validation takes a third of an update's time for a window, and the validation text is a twelfth of the training text.
seconds, epoch = 60 * float(minutes) / (1 + 1 / 36), int(epoch)
epochs = max(1, round(seconds / 2 / (epoch * float(shallow)))) if layers != "0" else 0
rest = (seconds - epochs * epoch * float(shallow)) / float(update)
print(epochs * epoch + max(1, round(rest)), precision, epochs)
PYTHON
    fi
    cat "$file"
}

# timed MODEL [LAYERS [FLAGS...]]: train the row that calls it, with FLAGS, for MINUTES, half of them with LAYERS layers
# unless that is 0.
timed() {
    local ROW_NAME="${FUNCNAME[1]}" model="$1" layers="${2:-0}" found="3 fp32 1" updates precision epochs grow=()
    shift "$(($# < 2 ? $# : 2))"
    [ -n "${SMOKE:-}" ] || found="$(budget "$layers" --model "$model" --preset small "$@")"
    read -r updates precision epochs <<<"$found"
    [ "$layers" = 0 ] || grow=(--grow "$layers:$epochs")
    train word_ptb --model "$model" --preset small "$@" --precision "$precision" --epochs 1000 --schedule cosine \
        --max_steps "$updates" ${grow[@]+"${grow[@]}"}
}

trellisnet() { timed trellisnet; }
grown() { timed trellisnet 4 --horizon 4 --batch_size 75; } # as many tokens per update, all of which see the state
awd_lstm() { timed awd-lstm; }
tcn() { timed tcn; }
rhn() { timed rhn; }
sparse_lstm() { timed sparse-lstm; }

rows trellisnet grown awd_lstm tcn rhn sparse_lstm
[ -n "${SMOKE:-}" ] || "$PY" "$ROOT/scripts/collect.py" --table compare --root "$ROOT"
