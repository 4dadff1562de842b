# Sourced by the other scripts: `install EXTRAS` puts timm_ep, editable, with these extras into .venv inside the checkout.
# A rerun with an unchanged pyproject.toml installs nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

install() {
    local extras="$1" python="${PYTHON:-python3}" stamp
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "timm_ep needs Python 3.11 or newer; '$python' is $("$python" --version 2>&1). Set PYTHON to a newer one." >&2
        exit 1
    }
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    stamp=".venv/installed-$extras"
    if [ ! -f "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$extras]"
        touch "$stamp"
    fi
    export PATH="$PWD/.venv/bin:$PATH"
}
