#!/usr/bin/env bash
# Runs pip-audit: lists known vulnerabilities of the packages that requirements.lock installs on this system. Also fails if the
# package index does not know a package. A mirror of PyPI may know no vulnerabilities at all.
set -euo pipefail
cd "$(dirname "$0")/../.."
tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
"${PYTHON:-python3}" -m venv "$tools/venv"
"$tools/venv/bin/python" -m pip install --quiet --disable-pip-version-check pip-audit
"$tools/venv/bin/pip-audit" --progress-spinner off --strict --no-deps --disable-pip --requirement requirements.lock "$@"
