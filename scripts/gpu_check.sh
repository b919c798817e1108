#!/usr/bin/env bash
# Run the checks and measurements that need a CUDA device, and train on it.
# usage: bash scripts/gpu_check.sh [PART]...     default: tests
#
# A bare checkout is enough: nothing is installed, no network is used. Python must have torch, triton, numpy, tqdm, pytest,
# pytest-xdist and hypothesis. Every command of a part has a time limit, and the next one runs even if it fails. After each
# command all results are packed into one file, OUT.tar. SIGTERM, SIGINT and SIGHUP end the running command, which still
# writes its results; a training writes its checkpoint.
#
# PART        minutes on an H100 (estimates), and what it does
#   short       5  look, tests, profile: within 300 seconds altogether
#   look        1  word_ptb, preset paper, bf16: 100 updates with and without a graph
#   tests       2  reference = fused = Triton in fp32, tf32 and bf16; streams; heads; resume bit for bit with
#                  --deterministic; graph = no graph; weights from device to device; the quick benchmark
#   profile     2  replayed steps of five configurations, and the kernels of one step of each
#   sweep       1  two of these steps with other launch shapes of the gate kernels
#   bench       6  word_ptb (paper) and pmnist at their real shapes: speed and share of the matrix peak; gates by Triton
#                  and by torch side by side
#   memory      4  word_ptb: every variant in a separate process
#   bench_all   6  speed at the shapes of the other three tasks
#   train       6  word_ptb, preset paper, 200 updates each in fp32, tf32 and bf16, with and without a graph
#   pixels      5  permuted MNIST, preset gpu: 11 layers of 500 channels, 20 epochs
#   words       9  word_ptb: 10 layers, then from their weights the 55 of the preset paper
#
# A first quarter of an hour on one H100:
#   carry       the checkout with data/penn and data/mnist, which git ignores; no .venv
#   minute  0   bash scripts/gpu_check.sh short      first its part "look": a run must have Triton's gates and a CUDA graph,
#                                                    the tests must pass, a step should take some 20 ms (word_ptb)
#   minute  5   bash scripts/gpu_check.sh pixels     or sweep, if gates cost most according to profile
#   minute 10   BUDGET=240 bash scripts/gpu_check.sh words
#   bring back  OUT.tar; `split -b 15M runs/gpu.tar runs/gpu.tar.` cuts it into pieces, and cat joins them. Runs with their
#               checkpoints stay in RUNS: train.py --resume continues an interrupted one.
#
# Exit code: 0 all passed; 1 a command failed or ran into its time limit (see summary.txt); 2 no usable device or an unknown
# part; 129, 130 or 143 after a signal.
# Environment:
#   PYTHON   the Python to use; default: that of .venv if there is one, else python3
#   OUT      folder of logs and results; default: runs/gpu
#   RUNS     folder of the runs that are trained; default: runs/gpu_runs
#   BUDGET   seconds for all parts together; default: 300 for short, otherwise only the commands' own limits
#   DATA     folder of the Penn Treebank; default: data/penn if it exists, else a synthetic corpus
#   IMAGES   folder of MNIST; default: data/mnist if it exists, else drawings
#   MORE     further flags of every training, e.g. "--max_steps 20"
#   WORKERS  processes of the tests; default: 8
set -euo pipefail

ROOT="$(CDPATH="" cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
for name in OUT RUNS DATA IMAGES; do # a relative path starts from the caller's directory, a default from the checkout
    case "${!name:-/}" in
    /*) ;;
    *) printf -v "$name" %s "$PWD/${!name}" ;;
    esac
done
cd "$ROOT"
PY="${PYTHON:-}"
if [ -z "$PY" ]; then
    PY=python3
    if [ -x .venv/bin/python ]; then PY=.venv/bin/python; fi
fi
OUT="${OUT:-runs/gpu}"
OUT="${OUT%/}"
RUNS="${RUNS:-runs/gpu_runs}"
export PYTHONPATH="$ROOT" PYTHONUNBUFFERED=1
PARTS=(short look tests profile sweep bench memory bench_all train pixels words)

refuse() {
    echo "error: $1" >&2
    exit 2
}

if [ $# = 0 ]; then set -- tests; fi
for part in "$@"; do
    case " ${PARTS[*]} " in
    *" $part "*) ;;
    *) refuse "expected one of ${PARTS[*]}, got $part" ;;
    esac
done
BUDGET="${BUDGET:-}"
if [ -z "$BUDGET" ] && [ "$*" = short ]; then BUDGET=300; fi
[[ "${BUDGET:-1}" =~ ^[1-9][0-9]*$ ]] || refuse "BUDGET: expected a number of seconds, got $BUDGET"

# Check the device first, and say in one line if it cannot be used.
found="$(timeout 120 "$PY" - 2>&1 <<'END'
import importlib.util, platform, sys


def need(*names):
    if missing := [name for name in names if not importlib.util.find_spec(name)]:
        sys.exit(f"error: {sys.executable} has no {', '.join(missing)}; name another Python with PYTHON=...")


need("torch", "numpy", "tqdm")
import torch

if not torch.cuda.is_available():
    sys.exit("error: no CUDA device; nothing was checked")
need("triton")
import triton

p = torch.cuda.get_device_properties(0)
print(f"python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
      f"cuDNN {torch.backends.cudnn.version()}, triton {triton.__version__}")
print(f"{torch.cuda.device_count()} x {p.name}, {p.total_memory / 2**30:.0f} GiB, {p.multi_processor_count} "
      f"multiprocessors, compute capability {p.major}.{p.minor}")
END
)" || {
    last="$(tail -n 1 <<<"$found")"
    case "$last" in
    "error: "*) refuse "${last#error: }" ;;
    *) refuse "$PY cannot use the device (${last:-no answer in two minutes}); nothing was checked" ;;
    esac
}
mkdir -p "$OUT" "$RUNS"
echo "$found" | tee "$OUT/versions.txt"
echo "# $(date -u '+%Y-%m-%d %H:%M:%S') $*" >>"$OUT/summary.txt"
if command -v nvidia-smi >/dev/null; then timeout 30 nvidia-smi >"$OUT/nvidia-smi.txt" 2>&1 || true; fi

DATA="${DATA:-data/penn}"
if [ ! -f "$DATA/train.txt" ]; then
    echo "no $DATA/train.txt: word_ptb is trained on a synthetic corpus, whose vocabulary is small" >&2
    DATA=synthetic
fi
IMAGES="${IMAGES:-data/mnist}"
if ! compgen -G "$IMAGES/train-images-idx3-ubyte*" >/dev/null; then
    echo "no $IMAGES/train-images-idx3-ubyte: pmnist is trained on drawings" >&2
    IMAGES=synthetic
fi

child=     # the running command
stopped=0  # exit code after a signal
failed=()
end() {
    stopped="$1"
    if [ -n "$child" ]; then kill "$child" 2>/dev/null || true; fi # timeout passes it on
}
trap 'end 129' HUP
trap 'end 130' INT
trap 'end 143' TERM

note() { # note NAME VERDICT: record "passed" or a failure
    echo "== $1: $2" | tee -a "$OUT/summary.txt"
    if [ "${2%%,*}" != passed ]; then failed+=("$1"); fi
    pack
}

pack() { # write all results into one file, atomically
    if ! { tar -cf "$OUT.tar.part" -C "$(dirname "$OUT")" "$(basename "$OUT")" && mv "$OUT.tar.part" "$OUT.tar"; }; then
        echo "error: $OUT.tar could not be written" >&2
    fi
}

step() { # step SECONDS NAME COMMAND...: run it with a time limit, keep its output and show the end
    local limit=$1 name=$2 begin=$SECONDS code=0 verdict
    shift 2
    if [ "$stopped" != 0 ]; then return; fi
    if [ -n "$BUDGET" ] && ((limit > BUDGET - SECONDS)); then limit=$((BUDGET - SECONDS)); fi
    if ((limit < 1)); then
        note "$name" "left out, no time"
        return
    fi
    echo "== $name: at most $limit s"
    timeout --kill-after=20 "$limit" "$@" >"$OUT/$name.txt" 2>&1 </dev/null &
    child=$!
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do # after a signal, until the command has ended
        code=0
        wait "$child" || code=$?
    done
    child=
    case $code in
    0) verdict=passed ;;
    124 | 137) verdict="time limit" ;;
    *) verdict="exit code $code" ;;
    esac
    if [ "$stopped" != 0 ]; then verdict=interrupted; fi
    tail -n "${SHOWN:-6}" "$OUT/$name.txt" | sed '$a\' # sed ends an incomplete last line
    note "$name" "$verdict, $((SECONDS - begin)) s"
}

training() { # training SECONDS NAME TASK FLAG...: train in RUNS/NAME and keep the records
    local limit=$1 name=$2 task=$3 run="$RUNS/$2" more
    shift 3
    if [ "$stopped" != 0 ]; then return; fi
    rm -rf "${run:?}" "$OUT/$name".* # or what this training does not reach would be that of an earlier one
    read -ra more <<<"${MORE:-}"
    step "$limit" "$name" "$PY" "$task/train.py" --device cuda --checkpoint_minutes 0 "$@" ${more[@]+"${more[@]}"} \
        --out "$run" --metrics "$OUT/$name.metrics.json"
    if [ ! -f "$run/log.txt" ]; then return; fi
    for file in log.txt config.json metrics.jsonl; do cp "$run/$file" "$OUT/$name.$file"; done
    tail -n 3 "$run/log.txt"
    pack
}

weights() { # weights NAME: keep the weights of a training as well, rounded to float16
    if [ ! -f "$RUNS/$1/weights.pkl" ]; then return; fi
    "$PY" - "$RUNS/$1/weights.pkl" "$OUT/$1.weights.pkl" <<'END' || note "$1" "weights could not be rounded"
import sys
import torch

tensors = torch.load(sys.argv[1], weights_only=True)
torch.save({name: t.half() if t.dtype == torch.float32 else t for name, t in tensors.items()}, sys.argv[2])
END
    pack
}

short() {
    look
    tests
    profile
}

look() {
    local graph
    for graph in on off; do
        training 70 "look_graph_$graph" word_ptb --preset paper --precision bf16 --data "$DATA" --cuda_graph "$graph" \
            --max_steps 100 --log-interval 20 --max_eval_tokens 2000
    done
    if ! { grep -qs '"gates": "triton"' "$OUT/look_graph_on.metrics.json" &&
        grep -qs '"cuda_graph": "on"' "$OUT/look_graph_on.metrics.json"; }; then
        note look "without Triton's gates or a CUDA graph, as look_graph_on.metrics.json says"
    fi
}

tests() {
    local xml="$OUT/tests.xml" skipped
    rm -f "$xml"
    step 200 tests env OMP_NUM_THREADS=2 "$PY" -m pytest -v -n "${WORKERS:-8}" --dist worksteal --maxfail 20 -W default \
        -m "cuda or not slow" -rs --junitxml "$xml" tests/test_cuda.py tests/test_triton.py
    if [ ! -f "$xml" ]; then return; fi
    # Skipped tests have not passed.
    skipped="$(grep -o ' skipped="[0-9]*"' "$xml" | tr -dc '0-9\n' | head -n 1)"
    if [ "$skipped" != 0 ]; then note tests "${skipped:-all} of them skipped"; fi
}

profile() {
    SHOWN=5 step 100 profile_times "$PY" scripts/profile_step.py times
    SHOWN=26 step 80 profile_kernels "$PY" scripts/profile_step.py kernels
}

sweep() { SHOWN=10 step 120 sweep "$PY" scripts/profile_step.py sweep; }

benchmark() { # benchmark SECONDS NAME FLAG...
    local limit=$1 name=$2
    shift 2
    if [ "$stopped" = 0 ]; then rm -f "$OUT/$name.json"; fi
    SHOWN=20 step "$limit" "$name" "$PY" scripts/bench.py --device cuda --json "$OUT/$name.json" "$@"
}

bench() {
    benchmark 300 bench --repeats 10 --tasks word_ptb pmnist --parts forward core step head --recompute 8 --no-memory
    benchmark 120 bench_eager_gates --repeats 10 --tasks word_ptb --parts core --no-memory --flags --gates eager
    benchmark 180 bench_evaluation --repeats 3 --tasks word_ptb --parts evaluation generation --no-memory
}

memory() { benchmark 400 memory --repeats 1 --tasks word_ptb --parts step head --recompute 8; }

bench_all() { benchmark 500 bench_all --repeats 5 --tasks char_ptb wt103 cifar10 --parts core step --no-memory; }

train() {
    local precision graph
    for precision in fp32 tf32 bf16; do
        for graph in off on; do
            training 120 "train_${precision}_$graph" word_ptb --preset paper --data "$DATA" --precision "$precision" \
                --cuda_graph "$graph" --max_steps 200 --max_eval_tokens 20000 --log-interval 20
        done
    done
}

pixels() {
    training 300 pixels pmnist --data "$IMAGES" --preset gpu
    weights pixels
}

words() {
    training 270 words_10_layers word_ptb --preset paper --data "$DATA" --precision bf16 --nlevels 10 --horizon 10 \
        --seq_len 62 --aux_freq 5 --epochs 60
    weights words_10_layers
    training 270 words_55_layers word_ptb --preset paper --data "$DATA" --precision bf16 --lr 5 --epochs 10 --when 7 9 \
        --load_weight "$RUNS/words_10_layers/weights.pkl"
    weights words_55_layers
}

for part in "$@"; do
    if [ "$stopped" = 0 ]; then "$part"; fi
done
if [ "$stopped" != 0 ]; then exit "$stopped"; fi
if [ "${#failed[@]}" != 0 ]; then
    echo "failed: ${failed[*]}; results in $OUT.tar" >&2
    exit 1
fi
echo "passed: $*; results in $OUT.tar"
