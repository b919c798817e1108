#!/usr/bin/env bash
# Training at the equilibrium against training with 16 layers: both continue from the shipped word-level model, for the same
# number of updates. `…_unrolled` scores the weights of a row, or the shipped ones, with 16 layers, `…_solved` at the
# equilibrium. `timed_…` are a few updates, to be alternated on an idle machine:
#   for seed in 1 2 3; do SEEDS=$seed ROWS="timed_unrolled timed_equilibrium" bash scripts/equilibrium.sh; done
# `paper_…` measure the memory of the paper's model. See tables.sh for SEEDS, ROWS, STEPS, SMOKE and ARGS.
. "$(dirname "${BASH_SOURCE[0]}")/tables.sh"

start=(--preset small)
[ -n "${SMOKE:-}" ] || start+=(--load_weight "$ROOT/results/word_ptb_small") # smoke runs have another size
# The rate of the shipped model's seventh and eighth epochs.
go_on=("${start[@]}" --lr 2 --schedule cosine --epochs 1 --max_steps 500)
timed=("${go_on[@]}" --max_steps 30 --max_eval_tokens 100)
paper=(--preset paper --aux 0 --max_steps 2 --max_eval_tokens 100)

start_unrolled() { train word_ptb "${start[@]}" --nlevels 16 --eval; }
start_solved() { train word_ptb "${start[@]}" --equilibrium --eval; }
unrolled() { train word_ptb "${go_on[@]}" --nlevels 16; }
unrolled_solved() { FROM=unrolled train word_ptb --preset small --equilibrium --eval; }
equilibrium() { train word_ptb "${go_on[@]}" --equilibrium; }
equilibrium_unrolled() { FROM=equilibrium train word_ptb --preset small --nlevels 16 --eval; }
timed_unrolled() { train word_ptb "${timed[@]}" --nlevels 16; }
timed_equilibrium() { train word_ptb "${timed[@]}" --equilibrium; }
paper_unrolled() { train word_ptb "${paper[@]}"; }
paper_recompute() { train word_ptb "${paper[@]}" --recompute; }
paper_equilibrium() { train word_ptb "${paper[@]}" --equilibrium; }

rows start_unrolled start_solved unrolled unrolled_solved equilibrium equilibrium_unrolled \
    timed_unrolled timed_equilibrium paper_unrolled paper_recompute paper_equilibrium
