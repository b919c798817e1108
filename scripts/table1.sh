#!/usr/bin/env bash
# Table 1 of the paper: word-level Penn Treebank. See tables.sh for SEEDS, ROWS, SMOKE and ARGS.
. "$(dirname "${BASH_SOURCE[0]}")/tables.sh"

trellisnet() { train word_ptb --preset paper; }
trellisnet_mos() { train word_ptb --preset paper-mos; }
# The paper gives no settings for its larger models; these widths make their sizes.
trellisnet_larger() { train word_ptb --preset paper --nhid 1310; }
trellisnet_mos_larger() { train word_ptb --preset paper-mos --nhid 1310; }

rows trellisnet trellisnet_mos trellisnet_larger trellisnet_mos_larger
