#!/usr/bin/env bash
# Table 3 of the paper: character-level Penn Treebank. See tables.sh for SEEDS, ROWS, SMOKE and ARGS.
. "$(dirname "${BASH_SOURCE[0]}")/tables.sh"

trellisnet() { train char_ptb --preset paper; }
# The same on the stream that most of the literature uses.
trellisnet_standard() { train char_ptb --preset paper --stream standard; }

rows trellisnet trellisnet_standard
