#!/usr/bin/env bash
# Known vulnerabilities of what requirements.lock installs here, by pip-audit. Fails, too, if one of them is unknown
# to the index: a mirror of PyPI may know of none.
set -euo pipefail
cd "$(dirname "$0")/../.."
tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
"${PYTHON:-python3}" -m venv "$tools/venv"
"$tools/venv/bin/python" -m pip install --quiet --disable-pip-version-check pip-audit
"$tools/venv/bin/pip-audit" --progress-spinner off --strict --no-deps --disable-pip --requirement requirements.lock "$@"
