#!/usr/bin/env bash
# enwik8 and text8, in bits per character: recurrent highway networks by their authors' recipes, and TrellisNets of the same
# size. See tables.sh for SEEDS, ROWS, STEPS, SMOKE and ARGS.
. "$(dirname "${BASH_SOURCE[0]}")/tables.sh"

enwik8_rhn() { train char_ptb --model rhn --preset enwik8; }
enwik8_rhn_depth_5() { train char_ptb --model rhn --preset enwik8-depth-5; }
enwik8_trellisnet() { train char_ptb --preset enwik8; }
text8_rhn() { train char_ptb --model rhn --preset text8; }
text8_trellisnet() { train char_ptb --preset text8; }

rows enwik8_rhn enwik8_rhn_depth_5 enwik8_trellisnet text8_rhn text8_trellisnet
