#!/usr/bin/env bash
# The recipe behind the presets `best` and `gpu`, on permuted MNIST, part by part: each row adds one part to the row before
# it, and all train for a fifth of the epochs of `best`. The last two rows are its complete recipe, and that recipe with
# --augment. See tables.sh for SEEDS, ROWS, STEPS, SMOKE and ARGS.
. "$(dirname "${BASH_SOURCE[0]}")/tables.sh"

short() { ROW_NAME="${FUNCNAME[1]}" train pmnist --preset best --epochs 2 "$@"; }
authors() { short --init_gain 0 --schedule step --lr 0.004 --ema 0 --label_smoothing 0; }
gain() { short --schedule step --lr 0.004 --ema 0 --label_smoothing 0; }
onecycle() { short --ema 0 --label_smoothing 0; }
ema() { short --label_smoothing 0; }
smoothing() { short; }
augment() { short --augment; }

rows authors gain onecycle ema smoothing augment
