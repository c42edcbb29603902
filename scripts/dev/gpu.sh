#!/usr/bin/env bash
# Runs what needs a GPU: the tests marked gpu, then rows of the benchmark. Writes logs and results to a folder.
#     bash scripts/dev/gpu.sh                              every row, to gpu-logs/
#     bash scripts/dev/gpu.sh logs/ recipe mixed free      these rows; "" for none
# For a machine without network: if there are wheels in .whl/, it uses the system's python3 and these wheels.
set -uo pipefail
cd "$(dirname "$0")/../.."
logs=$(realpath -m "${1:-gpu-logs}")
shift || true
mkdir -p "$logs"
if compgen -G '.whl/*.whl' > /dev/null; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$site" .whl/*.whl || exit
  export PYTHONPATH=$site
  python=python3
else
  source scripts/venv.sh requirements-test.txt || exit
  python=python
fi
export PYTHONUNBUFFERED=1
$python -m pytest -m gpu -p no:cacheprovider 2>&1 | tee "$logs/tests.txt"
passed=$?
[ $# = 0 ] || [ -n "$1" ] || exit $passed
$python scripts/dev/bench.py --out "$logs/bench.json" ${1:+--rows "$@"} 2>&1 | tee "$logs/bench.txt" && exit $passed
