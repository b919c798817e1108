#!/usr/bin/env bash
# Part-of-speech tagging with a sparse embedding (Demeester et al., 2018, section 4.3): the three commands of the authors'
# README, and a TrellisNet in the LSTM's place with about as many parameters, but no more. Name the folder of the tagged text,
# which is licensed, with ARGS="--data FOLDER"; or take a free one, Turkish articles tagged by hand:
#   pip download --no-deps turkish-treebanks==1.0.0
#   unzip -j turkish_treebanks-1.0.0-py3-none-any.whl data/wiki.conllu -d data/turkish
#   ARGS="--data data/turkish/wiki.conllu --columns 2 5" bash scripts/pos_table.sh
# See tables.sh for SEEDS, ROWS, STEPS and SMOKE.
. "$(dirname "${BASH_SOURCE[0]}")/tables.sh"

common=(--epochs 50 --dropouti 0.2 --wdrop 0.2)
sparse=(--emsize 20 --emb_density 0.25 --emb_blocks 20)

dense() { train pos_tagging --emsize 5 --nhid 10 "${common[@]}"; }
sparse() { train pos_tagging "${sparse[@]}" --nhid 10 "${common[@]}"; }
sparse_vocab_down() { train pos_tagging "${sparse[@]}" --nhid 10 "${common[@]}" --vocab_order down; }
dense_trellisnet() { train pos_tagging --model trellisnet --emsize 5 --nhid 7 "${common[@]}"; }
sparse_trellisnet() { train pos_tagging --model trellisnet "${sparse[@]}" --nhid 6 "${common[@]}"; }

rows dense sparse sparse_vocab_down dense_trellisnet sparse_trellisnet
