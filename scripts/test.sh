#!/usr/bin/env bash
# The whole check on the CPU: lint and all tests, in one process for each core. With arguments: only what pytest makes of them.
#     bash scripts/test.sh
#     bash scripts/test.sh -k resume
set -euo pipefail
source "$(dirname "$0")/venv.sh" requirements-test.txt

if [ $# = 0 ]; then
  bash scripts/dev/lint.sh
  set -- --numprocesses auto --maxprocesses 8 --dist worksteal
fi
python -m pytest "$@"
