#!/usr/bin/env bash
# Installs the newest versions that the ranges in requirements*.txt allow into .venv-newest, prints what differs from
# requirements.lock, and runs the tests. If they pass, scripts/dev/lock.sh can lock these versions.
#     bash scripts/dev/newest.sh
#     LIMITS='torch==2.13.0 transformers<5.23' bash scripts/dev/newest.sh -k interop      constraints; arguments for pytest
set -euo pipefail
cd "$(dirname "$0")/../.."
[ -f .venv-newest/bin/activate ] || "${PYTHON:-python3}" -m venv .venv-newest
source .venv-newest/bin/activate
python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager \
  --requirement requirements-test.txt --constraint <(printf '%s\n' ${LIMITS:-})
echo "differs from requirements.lock:"
python -m pip freeze | tr A-Z_ a-z- | grep -vxF -f <(sed "s/ ;.*//" requirements.lock) || echo "  nothing"
python -m pytest --deselect tests/test_requirements.py::test_what_is_installed_is_what_the_lock_says "$@"
