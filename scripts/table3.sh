#!/usr/bin/env bash
# Table 3 of the paper: character-level Penn Treebank. See tables.sh for SEEDS, ROWS, SMOKE and ARGS.
. "$(dirname "${BASH_SOURCE[0]}")/tables.sh"

trellisnet() { train char_ptb --preset paper; }
# The same on the stream that most of the literature uses.
trellisnet_standard() { train char_ptb --preset paper --stream standard; }
# The paper's baselines: the TCN on the stream of the first row, AWD-LSTM on that of the second.
tcn() { train char_ptb --model tcn; }
awd_lstm() { train char_ptb --model awd-lstm; }

rows trellisnet trellisnet_standard tcn awd_lstm
