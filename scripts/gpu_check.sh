#!/usr/bin/env bash
# Check on a CUDA device what cannot be checked without one. Fails loudly: without a device, and at the first error.
# usage: bash scripts/gpu_check.sh [tests | bench | memory | bench_all | train]...     default: tests
#
# A first session of half an hour on one H200, in this order (minutes are estimates):
#   bash scripts/gpu_check.sh tests     6   versions and device; reference = fused = Triton in fp32, tf32 and bf16; streams;
#                                           heads; resume bit for bit with --deterministic; graph = no graph; weights from
#                                           device to device; the quick benchmark. Compiles the kernels, ten seconds.
#   bash scripts/gpu_check.sh bench     6   word_ptb (paper) and pmnist at their real shapes: speed and share of the matrix
#                                           peak; gates by Triton and by torch side by side
#   bash scripts/gpu_check.sh memory    4   of word_ptb: every variant in a process of its own
#   bash scripts/gpu_check.sh bench_all 6   speed at the shapes of the other three tasks
#   bash scripts/gpu_check.sh train     6   word_ptb, preset paper, 200 updates each in fp32, tf32 and bf16, with and without
#                                           a graph: losses side by side, tokens a second
# It needs pytest and Triton: pip install -e .[dev,triton]
# Environment:
#   PYTHON  which Python; default: that of .venv if it is there, else python3. Nothing is installed.
#   OUT     folder of logs and results; default: runs/gpu
#   DATA    folder of the Penn Treebank; default: data/penn if it is there, else a synthetic corpus
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"
PY="${PYTHON:-}"
if [ -z "$PY" ]; then
    PY=python3
    if [ -x .venv/bin/python ]; then PY=.venv/bin/python; fi
fi
OUT="${OUT:-runs/gpu}"
mkdir -p "$OUT"
export PYTHONPATH="$ROOT" PYTHONUNBUFFERED=1
DATA="${DATA:-data/penn}"
if [ ! -f "$DATA/train.txt" ]; then
    echo "no $DATA/train.txt: training is checked on a synthetic corpus, whose vocabulary is small" >&2
    DATA=synthetic
fi

versions() {
    "$PY" - <<'END'
import importlib.util, platform, sys
import torch

if not torch.cuda.is_available():
    sys.exit("error: no CUDA device; nothing was checked")
p = torch.cuda.get_device_properties(0)
print(f"python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
      f"cuDNN {torch.backends.cudnn.version()}")
print(f"{torch.cuda.device_count()} x {p.name}, {p.total_memory / 2**30:.0f} GiB, {p.multi_processor_count} "
      f"multiprocessors, compute capability {p.major}.{p.minor}")
if importlib.util.find_spec("triton") is None:
    sys.exit("error: no Triton; pip install triton")
import triton

print(f"triton {triton.__version__}")
END
}

tests() {
    # A test that is skipped here has not been passed.
    "$PY" -m pytest -q --maxfail 20 -W default -m "cuda or not slow" -rs --junitxml "$OUT/tests.xml" \
        tests/test_cuda.py tests/test_triton.py
    "$PY" - "$OUT/tests.xml" <<'END'
import sys
import xml.etree.ElementTree as tree

suite = next(tree.parse(sys.argv[1]).iter("testsuite"))
count, skipped = int(suite.get("tests")), int(suite.get("skipped"))
if skipped or count < 40:
    sys.exit(f"error: {skipped} of {count} tests were skipped")
print(f"{count} tests passed")
END
}

bench() {
    "$PY" scripts/bench.py --device cuda --repeats 10 --tasks word_ptb pmnist --parts forward core step head \
        --recompute 8 --no-memory --json "$OUT/bench.json"
    "$PY" scripts/bench.py --device cuda --repeats 10 --tasks word_ptb --parts core --no-memory \
        --json "$OUT/bench_eager_gates.json" --flags --gates eager
    "$PY" scripts/bench.py --device cuda --repeats 3 --tasks word_ptb --parts evaluation generation --no-memory \
        --json "$OUT/bench_evaluation.json"
}

memory() {
    "$PY" scripts/bench.py --device cuda --repeats 1 --tasks word_ptb --parts step head --recompute 8 \
        --json "$OUT/memory.json"
}

bench_all() {
    "$PY" scripts/bench.py --device cuda --repeats 5 --tasks char_ptb wt103 cifar10 --parts core step --no-memory \
        --json "$OUT/bench_all.json"
}

train() {
    local precision graph name
    for precision in fp32 tf32 bf16; do
        for graph in off on; do
            name="train_${precision}_$graph"
            "$PY" word_ptb/train.py --preset paper --device cuda --data "$DATA" --precision "$precision" \
                --cuda_graph "$graph" --max_steps 200 --max_eval_tokens 20000 --log-interval 20 --checkpoint_minutes 0 \
                --out "$OUT/$name" --overwrite --metrics "$OUT/$name.json"
            cp "$OUT/$name/log.txt" "$OUT/$name.log"
            rm -r "${OUT:?}/$name" # hundreds of megabytes
        done
    done
    tail -n 4 "$OUT"/train_*.log
}

versions | tee "$OUT/versions.txt"
for part in "${@:-tests}"; do
    case "$part" in
    tests | bench | memory | bench_all | train) "$part" 2>&1 | tee "$OUT/$part.txt" ;;
    *)
        echo "error: expected tests, bench, memory, bench_all or train, got $part" >&2
        exit 2
        ;;
    esac
    echo "passed: $part"
done
