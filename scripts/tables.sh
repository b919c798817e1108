# Sourced by table1.sh … table6.sh and others, which name their rows. Every row is trained once per seed into
# runs/tables/<table>/<row>/seed-<seed>; finished runs are skipped and interrupted ones resumed, so a script can simply be
# started again. `python scripts/collect.py --table N` prints the finished runs.
#
#   SEEDS="1 2 3"   seeds (default: 1111, the authors')
#   ROWS="a b"      only these rows
#   SMOKE=1         tiny rows for a few steps on synthetic data, into runs/smoke instead
#   STEPS=1000      only 1000 updates per row, into runs/tables/<table>-1000-steps: a comparison at equal steps
#   ARGS="..."      further flags for every run, e.g. "--device cuda:1 --accumulate 2"
#   PY=python       this Python instead of one in .venv

set -euo pipefail
ROOT="$(CDPATH="" cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [ -z "${PY:-}" ]; then
    . "$ROOT/scripts/venv.sh"
    use_venv ""
fi
TABLE="$(basename "$0" .sh)"

# check NAME PATTERN EXPECTED: refuse any other value of an environment variable before anything is trained.
check() {
    if ! [[ "${!1:-}" =~ ^($2)?$ ]]; then
        echo "error: $1=${!1}: expected $3" >&2
        exit 2
    fi
}
check STEPS '[1-9][0-9]*' "a number of updates, 1 or more"
check SEEDS '[0-9]+( +[0-9]+)*' "whole numbers with spaces between them"
check SMOKE 1 "1, or nothing"
if ! command -v "$PY" >/dev/null; then
    echo "error: PY=$PY: no such program" >&2
    exit 2
fi

# Flags that reduce any row to a few seconds.
SMOKE_ALL="--data synthetic --overwrite --epochs 9 --max_steps 2 --max_eval_tokens 100 --nhid 8"
SMOKE_LANGUAGE="--emsize 8 --nout 8 --nlevels 4 --horizon 6 --aux_freq 2 --batch_size 4"

# limit FLAGS...: print the number of updates at which these flags end a run; nothing if they do not.
limit() {
    local word flag="" updates=""
    for word in "$@"; do
        case "$flag$word" in
        --max_steps=* | "--max_steps "*) updates="${word#--max_steps=}" ;;
        esac
        case "$word" in --max_steps) flag="$word " ;; *) flag="" ;; esac
    done
    echo "$updates"
}

# finished OUT LIMIT: whether the run in a folder has come to its end, or to that number of updates.
finished() { grep -qs -e '"complete": true' ${2:+-e "\"steps\": $2,"} "$1/metrics.json"; }

# train TASK FLAGS...: train the row that calls it (or that ROW_NAME names), once per seed, from the weights of the row
# that FROM names, if it does. The tasks `memory` and `pos_tagging` are scripts.
train() {
    local task="$1" program="$1/train.py" row="${ROW_NAME:-${FUNCNAME[1]}}" folder seed out flags more limit
    case "$task" in memory | pos_tagging) program="scripts/$task.py" ;; esac
    folder="$ROOT/runs/tables/$TABLE${STEPS:+-$STEPS-steps}"
    [ -z "${SMOKE:-}" ] || folder="$ROOT/runs/smoke/$TABLE"
    shift
    read -ra more <<<"${ARGS:-}"
    limit="$(limit "$@" ${STEPS:+--max_steps "$STEPS"} ${more[@]+"${more[@]}"})"
    for seed in ${SEEDS:-1111}; do
        out="$folder/$row/seed-$seed"
        flags=("$@" --seed "$seed" ${FROM:+--load_weight "$folder/$FROM/seed-$seed"})
        if [ -n "${SMOKE:-}" ]; then
            read -ra more <<<"$SMOKE_ALL"
            flags+=("${more[@]}")
            case "$task" in
            *ptb | wt103)
                read -ra more <<<"$SMOKE_LANGUAGE"
                flags+=("${more[@]}")
                ;;
            memory) flags+=(--length 20 --examples 64) ;;
            esac
        else
            if finished "$out" "$limit"; then
                echo "$TABLE $row, seed $seed: finished"
                continue
            fi
            if [ -n "${FROM:-}" ] && ! finished "$folder/$FROM/seed-$seed" "${STEPS:-}"; then
                echo "error: $TABLE $row, seed $seed: starts from the row $FROM, which is not finished; train it first" >&2
                exit 2
            fi
            if [ -f "$out/last.pt" ] || [ -f "$out/last.previous.pt" ] || [ -f "$out/best.pt" ]; then # any is enough
                flags=(--resume ${STEPS:+--max_steps "$STEPS"})
            else
                flags+=(${STEPS:+--max_steps "$STEPS"} --overwrite) # a run that ended before its first checkpoint
            fi
        fi
        read -ra more <<<"${ARGS:-}"
        echo "$TABLE $row, seed $seed: python $program ${flags[*]} ${more[*]:-}"
        mkdir -p "$out" # for the metrics of rows that only score
        "$PY" "$ROOT/$program" "${flags[@]}" ${more[@]+"${more[@]}"} --out "$out" --metrics "$out/metrics.json"
    done
}

# rows NAME...: train these rows, or only those that ROWS names.
rows() {
    local name
    for name in ${ROWS:-}; do
        if [[ " $* " != *" $name "* ]]; then
            echo "error: $TABLE has no row $name; it has: $*" >&2
            exit 2
        fi
    done
    for name in ${ROWS:-"$@"}; do
        "$name"
    done
}
