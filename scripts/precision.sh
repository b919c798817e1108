#!/usr/bin/env bash
# Products in bfloat16 against single precision: two epochs of word-level Penn Treebank by the preset small, two seeds
# each. See tables.sh for SEEDS, ROWS, STEPS, SMOKE and ARGS. The settings are the same, the order of the data too; what
# differs between seeds, the initial weights and the masks, is the noise to compare with.
. "$(dirname "${BASH_SOURCE[0]}")/tables.sh"

: "${SEEDS:=1111 2}"
fp32() { train word_ptb --preset small --epochs 2 --precision fp32; }
bf16() { train word_ptb --preset small --epochs 2 --precision bf16; }

rows fp32 bf16
