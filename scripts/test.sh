#!/usr/bin/env bash
# The whole check: lint and every test, on the CPU. Arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/venv.sh" requirements-test.txt

ruff check .
ruff format --check .
python -m pytest "$@"
