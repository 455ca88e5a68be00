# Shared by the scripts beside it: sets ROOT and offers ensure_venv. Source it; it runs nothing by itself.
# shellcheck shell=bash

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

say() { printf '%s\n' "$*" >&2; }

# Prints the first usable Python. The default one comes first: pip's configuration is usually made for it.
find_python() {
    local candidate candidates=(python3 python python3.13 python3.12 python3.11)
    if [[ -n ${PYTHON:-} ]]; then
        candidates=("$PYTHON")
    fi
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    say "error: no Python 3.11, 3.12 or 3.13 found; looked for: ${candidates[*]}"
    say "hint: install one of them, or name it: PYTHON=/path/to/python3.12 $0"
    return 1
}

# create_venv DIR: makes a virtual environment with pip in it, also where the system splits off ensurepip.
create_venv() {
    local python
    python=$(find_python)
    say "creating ${1#"$ROOT"/} with $("$python" --version)"
    if "$python" -c 'import ensurepip' 2>/dev/null; then
        "$python" -m venv --clear "$1"
    else
        "$python" -m venv --clear --without-pip "$1"
        "$python" -m pip --python "$1/bin/python" install --quiet pip
    fi
}

# What an installed environment depends on: the declared dependencies, the pins, and where this tree lies.
fingerprint() {
    { printf '%s\n' "$ROOT"; cat "$ROOT/pyproject.toml" "$ROOT/scripts/constraints.txt"; } | cksum
}

# ensure_venv: makes .venv, or reuses it (with whatever torch build it already holds) and installs what is missing.
# A stamp written at the very end lets the next run start at once.
ensure_venv() {
    local venv="$ROOT/.venv" pins="$ROOT/scripts/constraints.txt" stamp
    stamp="$venv/expertcut.stamp"
    if [[ -f $stamp && $(<"$stamp") == "$(fingerprint)" ]] && "$venv/bin/python" -c '' 2>/dev/null; then
        return
    fi
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || create_venv "$venv"
    say "installing expertcut and the tested versions of its dependencies into .venv (the first time takes minutes)"
    "$venv/bin/python" -m pip install --quiet --constraint "$pins" torch
    "$venv/bin/python" -m pip install --quiet --constraint "$pins" --editable "$ROOT[dev,eval]"
    fingerprint >"$stamp"
}
