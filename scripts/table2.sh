#!/usr/bin/env bash
# Table 2 of the paper: WikiText-103. See tables.sh for SEEDS, ROWS, SMOKE and ARGS.
. "$(dirname "${BASH_SOURCE[0]}")/tables.sh"

trellisnet() { train wt103 --preset paper; }

rows trellisnet
