#!/usr/bin/env bash
# Table 2 of the paper: WikiText-103. See tables.sh for SEEDS, ROWS, SMOKE and ARGS.
. "$(dirname "${BASH_SOURCE[0]}")/tables.sh"

trellisnet() { train wt103 --preset paper; }
# What the paper compares with; its authors published neither sizes nor settings, these are ours.
tcn() { train wt103 --model tcn; }

rows trellisnet tcn
