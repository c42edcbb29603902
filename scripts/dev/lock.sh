#!/usr/bin/env bash
# Makes requirements.lock anew: of every package that requirements-test.txt brings, directly or not, the one version that
# scripts/venv.sh installs, for Python 3.11 and later on Linux, macOS and Windows. Run scripts/dev/newest.sh first.
#     bash scripts/dev/lock.sh                        the newest that the ranges allow
#     bash scripts/dev/lock.sh 'transformers<5.23'    with further limits
set -euo pipefail
cd "$(dirname "$0")/../.."
tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
"${PYTHON:-python3}" -m venv "$tools/venv"
"$tools/venv/bin/python" -m pip install --quiet --disable-pip-version-check uv

# PyTorch stays at 2.13.0, of which the machines of this project hold a CPU build; newest.sh tries what is newer.
printf '%s\n' 'torch==2.13.0' "$@" > "$tools/limits.txt"
rm -f requirements.lock  # uv would keep to what is in it
"$tools/venv/bin/uv" pip compile --quiet --universal --python-version 3.11 --no-annotate --no-emit-index-url \
  --custom-compile-command 'bash scripts/dev/lock.sh' --constraint "$tools/limits.txt" \
  --output-file requirements.lock requirements-test.txt
