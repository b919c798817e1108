# Sourced by the other scripts: makes or reuses .venv and installs the project into it.
# usage: use_venv EXTRAS     EXTRAS is empty or e.g. "dev"; afterwards $ROOT and $PY are set.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PY="$ROOT/.venv/bin/python"

use_venv() {
    local extras="$1" base="${PYTHON:-python3}" stamp wanted
    if [ ! -x "$PY" ] || [ ! -e "$ROOT/.venv/bin/pip" ]; then # missing, or interrupted while it was made
        command -v "$base" >/dev/null || {
            echo "error: $base: no such program; name a Python of 3.11 or newer with PYTHON=..." >&2
            return 2
        }
        "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
            echo "error: $base is older than Python 3.11; name a newer one with PYTHON=..." >&2
            return 2
        }
        echo "making $ROOT/.venv"
        # As -m venv does, without a traceback at Ctrl-C.
        "$base" -c 'import runpy, signal
signal.signal(signal.SIGINT, signal.SIG_DFL)
runpy.run_module("venv", run_name="__main__")' "$ROOT/.venv"
    fi
    # Install again only when what is to be installed has changed.
    stamp="$ROOT/.venv/.installed-${extras:-base}"
    wanted="$(cat "$ROOT/requirements.txt" "$ROOT/setup.py" "$ROOT/pyproject.toml" | cksum) $(echo "$ROOT"/*/__init__.py)"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "installing into $ROOT/.venv"
        "$PY" -m pip install --quiet --disable-pip-version-check -r "$ROOT/requirements.txt"
        "$PY" -m pip install --quiet --disable-pip-version-check -e "$ROOT${extras:+[$extras]}"
        printf '%s\n' "$wanted" >"$stamp"
    fi
}
