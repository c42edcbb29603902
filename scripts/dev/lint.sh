#!/usr/bin/env bash
# Static checks: ruff's rules and format, and mypy's types. test.sh and pre-commit run this.
set -euo pipefail
cd "$(dirname "$0")/../.."
PATH="$PWD/.venv/bin:$PATH"

ruff check .
ruff format --check .
mypy
