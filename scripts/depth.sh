#!/usr/bin/env bash
# Depth over a run, on words and characters, at a size that takes minutes on two CPU cores. `fixed`, `grown` and `windows`
# cost the same number of multiply-adds to within 3 %; `windows` has windows no longer than its 8 layers reach, and as many
# tokens per update. `random` is one network for all depths, `depth_N` one for each, with equal updates.
# See tables.sh for SEEDS, ROWS, STEPS, SMOKE and ARGS.
. "$(dirname "${BASH_SOURCE[0]}")/tables.sh"

# plan TASK FLAGS...: train the row that calls the function that calls this.
plan() { ROW_NAME="${FUNCNAME[2]}" train "$1" --preset small --schedule cosine "${@:2}"; }
word() { plan word_ptb --emsize 64 --nhid 96 --nout 64 "$@"; }
char() { plan char_ptb --emsize 16 --nhid 48 --nout 16 "$@"; }

word_fixed() { word --epochs 3; }
word_grown() { word --epochs 4 --grow 2:2; }
word_windows() { word --epochs 3 --horizon 8 --batch_size 38; }
word_random() { word --epochs 3 --random_depth 2 --eval_depths 2 4 6; }
word_depth_2() { word --epochs 3 --nlevels 2; }
word_depth_4() { word --epochs 3 --nlevels 4; }
word_depth_6() { word --epochs 3 --nlevels 6; }
char_fixed() { char --epochs 3; }
char_grown() { char --epochs 4 --grow 4:2; }
char_windows() { char --epochs 3 --horizon 8 --batch_size 80; }
char_random() { char --epochs 3 --random_depth 2 --eval_depths 2 4 6; }
char_depth_2() { char --epochs 3 --nlevels 2; }
char_depth_4() { char --epochs 3 --nlevels 4; }
char_depth_6() { char --epochs 3 --nlevels 6; }

rows word_fixed word_grown word_windows word_random word_depth_2 word_depth_4 word_depth_6 \
    char_fixed char_grown char_windows char_random char_depth_2 char_depth_4 char_depth_6
