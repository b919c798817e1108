#!/usr/bin/env bash
# Recurrent highway networks at every depth of the table in their authors' README, with tied weights and without. See
# tables.sh for SEEDS, ROWS, STEPS, SMOKE and ARGS. Their score by 1000 passes with dropout, of a finished row:
#
#   run=runs/tables/rhn_table/depth_5/seed-1111
#   python word_ptb/train.py --config $run/config.json --load_weight $run/weights.pkl --eval --mc_dropout 1000
. "$(dirname "${BASH_SOURCE[0]}")/tables.sh"

all=()
for depth in 1 2 3 4 5 6 7 8 9 10; do
    eval "depth_$depth() { train word_ptb --model rhn --preset depth-$depth; }"
    eval "depth_${depth}_untied() { train word_ptb --model rhn --preset depth-$depth --no-tied; }"
    all+=("depth_$depth" "depth_${depth}_untied")
done

rows "${all[@]}"
