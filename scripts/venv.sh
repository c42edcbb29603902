# Sourced by demo.sh and test.sh: enters the repository and .venv, made with $PYTHON (python3) if it is not there, and installs
# the versions of requirements.lock.
# usage: source scripts/venv.sh REQUIREMENTS_FILE
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ ! -f .venv/bin/activate ]; then
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: PYTHON=python3.12 bash …")'
  "${PYTHON:-python3}" -m venv .venv
fi
source .venv/bin/activate
python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --requirement "$1"
