# Makes the repository's own virtual environment in .venv and puts it first in PATH. Sourced by the other scripts.
# PYTHON names another interpreter than python3; pip's own settings (PIP_INDEX_URL and so on) count as always.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
constraints=$root/launch/constraints.txt

install_environment() {
    local python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "clantune_scale needs Python 3.10 or newer, and $python is $("$python" -V 2>&1). Set PYTHON to a newer one." >&2
        return 1
    }
    echo "environment: installing into $venv (some minutes, once)"
    "$python" -m venv --clear "$venv"
    local install=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet --constraint "$constraints")
    # torch first: it is by far the largest, and if it is not available the rest need not be installed.
    echo "environment: torch"
    "${install[@]}" torch
    echo "environment: clantune-scale and what it needs"
    "${install[@]}" --editable "$root[test]"
}

# The stamp holds what the environment was made from, and where: a virtual environment cannot be moved.
made_from=$(cat "$root/pyproject.toml" "$constraints" <(echo "$root") | cksum)
if [ "$(cat "$venv/.made_from" 2>/dev/null)" != "$made_from" ]; then
    install_environment
    echo "$made_from" >"$venv/.made_from"
fi
export PATH="$venv/bin:$PATH"
