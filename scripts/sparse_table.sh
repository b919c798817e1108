#!/usr/bin/env bash
# Predefined sparseness on word-level Penn Treebank (Demeester et al., 2018, Tables 1 and 3): language modelling with about
# the same number of recurrent weights, and learning to recite the training text with 24.2M and with 7.07M parameters. See
# tables.sh for SEEDS, ROWS, STEPS, SMOKE and ARGS.
. "$(dirname "${BASH_SOURCE[0]}")/tables.sh"

dense() { train word_ptb --model awd-lstm; }
dense_finetuned() { FROM=dense train word_ptb --model awd-lstm --preset finetune --min_epochs 100; }
sparse() { train word_ptb --model sparse-lstm; }
sparse_finetuned() { FROM=sparse train word_ptb --model sparse-lstm --preset finetune; }
recite_dense() { train word_ptb --model awd-lstm --preset recite; }
recite_dense_reduced() { train word_ptb --model awd-lstm --preset recite --emsize 200 --nout 200 --nhid 575; }
recite_sparse_hidden() {
    train word_ptb --model sparse-lstm --preset recite --emsize 200 --nout 200 \
        --sparse_mode sparse_hidden --sparse_fract 0.5
}
recite_sparse_all() {
    train word_ptb --model sparse-lstm --preset recite --emb_blocks 10 --emb_density 0.5 \
        --sparse_mode sparse_all --sparse_fract 0.5
}

rows dense dense_finetuned sparse sparse_finetuned recite_dense recite_dense_reduced recite_sparse_hidden recite_sparse_all
