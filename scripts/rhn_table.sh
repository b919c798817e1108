#!/usr/bin/env bash
# Recurrent highway networks at every depth of the table in their authors' README, with tied weights and without. See
# tables.sh for SEEDS, ROWS, STEPS, SMOKE and ARGS. To score a finished row by 1000 passes with dropout:
#
#   run=runs/tables/rhn_table/depth_5/seed-1111
#   python word_ptb/train.py --run $run --eval --mc_dropout 1000 --mc_file $run/passes
. "$(dirname "${BASH_SOURCE[0]}")/tables.sh"

depth_1() { train word_ptb --model rhn --preset depth-1; }
depth_1_untied() { train word_ptb --model rhn --preset depth-1 --no-tied; }
depth_2() { train word_ptb --model rhn --preset depth-2; }
depth_2_untied() { train word_ptb --model rhn --preset depth-2 --no-tied; }
depth_3() { train word_ptb --model rhn --preset depth-3; }
depth_3_untied() { train word_ptb --model rhn --preset depth-3 --no-tied; }
depth_4() { train word_ptb --model rhn --preset depth-4; }
depth_4_untied() { train word_ptb --model rhn --preset depth-4 --no-tied; }
depth_5() { train word_ptb --model rhn --preset depth-5; }
depth_5_untied() { train word_ptb --model rhn --preset depth-5 --no-tied; }
depth_6() { train word_ptb --model rhn --preset depth-6; }
depth_6_untied() { train word_ptb --model rhn --preset depth-6 --no-tied; }
depth_7() { train word_ptb --model rhn --preset depth-7; }
depth_7_untied() { train word_ptb --model rhn --preset depth-7 --no-tied; }
depth_8() { train word_ptb --model rhn --preset depth-8; }
depth_8_untied() { train word_ptb --model rhn --preset depth-8 --no-tied; }
depth_9() { train word_ptb --model rhn --preset depth-9; }
depth_9_untied() { train word_ptb --model rhn --preset depth-9 --no-tied; }
depth_10() { train word_ptb --model rhn --preset depth-10; }
depth_10_untied() { train word_ptb --model rhn --preset depth-10 --no-tied; }

rows depth_1 depth_1_untied depth_2 depth_2_untied depth_3 depth_3_untied depth_4 depth_4_untied depth_5 depth_5_untied \
    depth_6 depth_6_untied depth_7 depth_7_untied depth_8 depth_8_untied depth_9 depth_9_untied depth_10 depth_10_untied
