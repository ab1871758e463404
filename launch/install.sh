# Sourced by the other scripts: a virtual environment in .venv with the versions of constraints.txt; does nothing twice.
# INSTALL names what to install (default: the project alone), PYTHON the interpreter (3.11 or newer).
# shellcheck shell=bash
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: $("$python" --version) is too old: Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11" >&2
  exit 2
}
[ -x .venv/bin/pip ] || "$python" -m venv .venv
# shellcheck source=/dev/null
source .venv/bin/activate
install="${INSTALL:-.}"
stamp=".venv/installed-$(echo "$install" "$(cat constraints.txt pyproject.toml)" | sha256sum | cut -c1-16)"
if [ ! -e "$stamp" ]; then
  echo "installing into .venv (about 2 GB, a few minutes)"
  # torch first: with it in place, no other package draws in a build of its own choice
  python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
  python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable "$install"
  touch "$stamp"
fi
