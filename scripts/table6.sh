#!/usr/bin/env bash
# Table 6 of the paper: what is lost without each part, on word-level Penn Treebank. See tables.sh for SEEDS, ROWS, SMOKE
# and ARGS.
. "$(dirname "${BASH_SOURCE[0]}")/tables.sh"

trellisnet() { train word_ptb --preset paper; }
no_hidden_dropout() { train word_ptb --preset paper --dropouth 0; }
no_weight_dropout() { train word_ptb --preset paper --wdrop 0; }
no_auxiliary_losses() { train word_ptb --preset paper --aux 0; }
# Our reading of "long sequence parallelism" removed: short windows end to end with a carried state, as recurrent
# networks are trained.
no_long_sequence_parallelism() { train word_ptb --preset paper --repack --seq_len 0 --horizon 58; }

rows trellisnet no_hidden_dropout no_weight_dropout no_auxiliary_losses no_long_sequence_parallelism
