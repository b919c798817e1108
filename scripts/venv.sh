# Sourced by the other scripts: create or reuse .venv, and install the project into it.
# usage: use_venv EXTRAS     EXTRAS is empty or e.g. "dev"; sets $ROOT and $PY.

ROOT="$(CDPATH="" cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PY="$ROOT/.venv/bin/python"

# patiently COMMAND...: show what a command prints and, whenever it says nothing for four seconds, how long it has run.
patiently() {
    local line status began=$SECONDS
    "$@" | while true; do
        status=0
        IFS= read -r -t 4 line || status=$?
        case "$status" in
        0) [[ $line == *"already satisfied"* ]] || echo "  $line" ;;
        1) [ -z "$line" ] || echo "  $line"; cat; break ;; # it has ended
        *) echo "  … $((SECONDS - began)) s" ;;
        esac
    done
}

use_venv() {
    local extras="$1" base="${PYTHON:-python3}" stamp wanted pip
    if [ ! -x "$PY" ] || [ ! -e "$ROOT/.venv/bin/pip" ]; then # missing or incomplete
        command -v "$base" >/dev/null || {
            echo "error: $base: no such program; name a Python of 3.11 or newer with PYTHON=..." >&2
            return 2
        }
        "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
            echo "error: $base is older than Python 3.11; name a newer one with PYTHON=..." >&2
            return 2
        }
        echo "making $ROOT/.venv"
        # Like -m venv, but Ctrl-C leaves no traceback.
        patiently "$base" -c 'import runpy, signal
signal.signal(signal.SIGINT, signal.SIG_DFL)
runpy.run_module("venv", run_name="__main__")' "$ROOT/.venv"
    fi
    # Install again only if the requirements have changed.
    stamp="$ROOT/.venv/.installed-${extras:-base}"
    wanted="$(cat "$ROOT/requirements.txt" "$ROOT/setup.py" "$ROOT/pyproject.toml" | cksum) $(echo "$ROOT"/*/__init__.py)"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "installing into $ROOT/.venv; PyTorch is a large download"
        # Python compiles what it imports; compiling all of PyTorch's modules now takes longer than installing them.
        pip=("$PY" -m pip install --progress-bar off --disable-pip-version-check --no-compile)
        patiently "${pip[@]}" -r "$ROOT/requirements.txt"
        patiently "${pip[@]}" -e "$ROOT${extras:+[$extras]}"
        echo "loading PyTorch once, which is slow the first time"
        patiently "$PY" -c 'import torch._dynamo, trellisnet' # optimisers import the former
        printf '%s\n' "$wanted" >"$stamp"
    fi
}
