#!/usr/bin/env bash
# Table 2 of the paper: WikiText-103. See tables.sh for SEEDS, ROWS, SMOKE and ARGS.
. "$(dirname "${BASH_SOURCE[0]}")/tables.sh"

trellisnet() { train wt103 --preset paper; }
# The paper's baseline; its authors published neither size nor settings, so these are ours.
tcn() { train wt103 --model tcn; }

rows trellisnet tcn
