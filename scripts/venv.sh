# Sourced by the other scripts: make .venv, or reuse it, and install the project into it.
# usage: use_venv EXTRAS     EXTRAS is empty or e.g. "dev"; sets $ROOT and $PY.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PY="$ROOT/.venv/bin/python"

use_venv() {
    local extras="$1" base="${PYTHON:-python3}" stamp wanted
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
        "$base" -c 'import runpy, signal
signal.signal(signal.SIGINT, signal.SIG_DFL)
runpy.run_module("venv", run_name="__main__")' "$ROOT/.venv"
    fi
    # Install again only after a change of what is installed.
    stamp="$ROOT/.venv/.installed-${extras:-base}"
    wanted="$(cat "$ROOT/requirements.txt" "$ROOT/setup.py" "$ROOT/pyproject.toml" | cksum) $(echo "$ROOT"/*/__init__.py)"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "installing into $ROOT/.venv"
        "$PY" -m pip install --quiet --disable-pip-version-check -r "$ROOT/requirements.txt"
        "$PY" -m pip install --quiet --disable-pip-version-check -e "$ROOT${extras:+[$extras]}"
        printf '%s\n' "$wanted" >"$stamp"
    fi
}
