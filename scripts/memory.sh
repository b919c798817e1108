#!/usr/bin/env bash
# Tests of memory: the copy task (T = 400) and the adding problem (T = 600) of Bai, Kolter & Koltun (2018), for four networks
# of the same size; for the recurrent highway network, the slowest, T = 100. One more row of each trains a TrellisNet whose
# receptive field is too short. See tables.sh for SEEDS, ROWS, SMOKE and ARGS.
. "$(dirname "${BASH_SOURCE[0]}")/tables.sh"

copy_trellisnet() { train memory --preset copy; }
copy_trellisnet_short() { train memory --preset copy --nlevels 2 --dilation 200; }
copy_tcn() { train memory --preset tcn; }
copy_awd_lstm() { train memory --preset awd-lstm; }
copy_rhn() { train memory --preset rhn; }
adding_trellisnet() { train memory --preset adding; }
adding_trellisnet_short() { train memory --preset adding --nlevels 4; }
adding_tcn() { train memory --preset tcn-adding; }
adding_awd_lstm() { train memory --preset awd-lstm-adding; }
adding_rhn() { train memory --preset rhn-adding; }

rows copy_trellisnet copy_trellisnet_short copy_tcn copy_awd_lstm copy_rhn \
    adding_trellisnet adding_trellisnet_short adding_tcn adding_awd_lstm adding_rhn
