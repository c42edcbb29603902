#!/usr/bin/env bash
# Rewrites requirements.lock: the version that scripts/venv.sh installs of every direct and indirect requirement in
# requirements-test.txt, for Python 3.11 and later on Linux, macOS and Windows. Run scripts/dev/newest.sh first.
#     bash scripts/dev/lock.sh                        the newest versions that the ranges allow
#     bash scripts/dev/lock.sh 'transformers<5.23'    with further constraints
set -euo pipefail
cd "$(dirname "$0")/../.."
tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
"${PYTHON:-python3}" -m venv "$tools/venv"
"$tools/venv/bin/python" -m pip install --quiet --disable-pip-version-check uv

# PyTorch stays at 2.13.0, because the project's machines have a CPU build of it installed; newest.sh tests newer versions.
printf '%s\n' 'torch==2.13.0' "$@" > "$tools/limits.txt"
rm -f requirements.lock  # otherwise uv prefers the versions in it
"$tools/venv/bin/uv" pip compile --quiet --universal --python-version 3.11 --no-annotate --no-emit-index-url \
  --custom-compile-command 'bash scripts/dev/lock.sh' --constraint "$tools/limits.txt" \
  --output-file requirements.lock requirements-test.txt
