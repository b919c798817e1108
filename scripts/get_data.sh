#!/usr/bin/env bash
# Fetch missing data: Penn Treebank (ptb) into data/penn, the others into data/<name>. Existing files are left alone.
# usage: bash scripts/get_data.sh [ptb|wikitext-103|enwik8|text8|mnist|cifar10|all]
set -euo pipefail

sets=()
[ $# -gt 1 ] || case "${1-ptb}" in
    ptb) sets=(word_ptb.data:penn) ;;
    wikitext-103) sets=(wt103.data:wikitext-103) ;;
    mnist) sets=(pmnist.data:mnist) ;;
    cifar10) sets=(cifar10.data:cifar10) ;;
    enwik8 | text8) sets=("trellisnet.data.wikipedia $1:$1") ;;
    all)
        sets=(word_ptb.data:penn wt103.data:wikitext-103 "trellisnet.data.wikipedia enwik8:enwik8"
            "trellisnet.data.wikipedia text8:text8" pmnist.data:mnist cifar10.data:cifar10)
        ;;
esac
if [ ${#sets[@]} -eq 0 ]; then
    usage='usage: bash scripts/get_data.sh [ptb|wikitext-103|enwik8|text8|mnist|cifar10|all]'
    printf 'error: %s: no such data; %s\n' "$*" "$usage" >&2
    exit 2
fi
. "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
use_venv ""

cd "$ROOT"
status=0
for set in "${sets[@]}"; do
    read -ra module <<<"${set%%:*}"
    "$PY" -m "${module[@]}" "data/${set#*:}" || status=$? # the others may succeed
    [ "$status" -lt 128 ] || break # a signal ends them all
done
exit "$status"
