#!/usr/bin/env bash
# Table 1 of the paper: word-level Penn Treebank. See tables.sh for SEEDS, ROWS, SMOKE and ARGS.
. "$(dirname "${BASH_SOURCE[0]}")/tables.sh"

trellisnet() { train word_ptb --preset paper; }
trellisnet_mos() { train word_ptb --preset paper-mos; }
# The paper gives no settings for its larger models; these widths give their sizes.
trellisnet_larger() { train word_ptb --preset paper --nhid 1310; }
trellisnet_mos_larger() { train word_ptb --preset paper-mos --nhid 1310; }

# The paper's baselines; the finetuned ones, rhn and sparse_lstm are not in its table.
tcn() { train word_ptb --model tcn; }
awd_lstm() { train word_ptb --model awd-lstm; }
awd_lstm_finetuned() { FROM=awd_lstm train word_ptb --model awd-lstm --preset finetune; }
awd_lstm_mos() { train word_ptb --model awd-lstm --preset mos; }
awd_lstm_mos_finetuned() { FROM=awd_lstm_mos train word_ptb --model awd-lstm --preset mos-finetune; }
rhn() { train word_ptb --model rhn; }
sparse_lstm() { train word_ptb --model sparse-lstm; }

rows trellisnet trellisnet_mos trellisnet_larger trellisnet_mos_larger tcn awd_lstm awd_lstm_finetuned \
    awd_lstm_mos awd_lstm_mos_finetuned rhn sparse_lstm
