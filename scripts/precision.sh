#!/usr/bin/env bash
# Compare products in bfloat16 with single precision: two epochs of word-level Penn Treebank with the preset small, two
# seeds each. Settings and the order of the data are the same; initial weights and masks differ between seeds, which is the
# noise to compare with. See tables.sh for SEEDS, ROWS, STEPS, SMOKE and ARGS.
. "$(dirname "${BASH_SOURCE[0]}")/tables.sh"

: "${SEEDS:=1111 2}"
fp32() { train word_ptb --preset small --epochs 2 --precision fp32; }
bf16() { train word_ptb --preset small --epochs 2 --precision bf16; }

rows fp32 bf16
