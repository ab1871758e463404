# Create a virtual environment in .venv with the versions of constraints.txt, and activate it.
# Sourced by the other scripts; a second call installs nothing. INSTALL: what to install (default:
# the project alone); PYTHON: the interpreter (3.11 or newer).
# shellcheck shell=bash
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: $("$python" --version) is too old: Python 3.11 or newer is needed;" \
    "set PYTHON=/path/to/python3.11" >&2
  exit 2
}
[ -x .venv/bin/pip ] || "$python" -m venv .venv
# shellcheck source=/dev/null
source .venv/bin/activate
install="${INSTALL:-.}"
contents="$install $(cat constraints.txt pyproject.toml)"
stamp=".venv/installed-$(echo "$contents" | sha256sum | cut -c1-16)"
if [ ! -e "$stamp" ]; then
  echo "installing into .venv (about 2 GB, a few minutes)"
  # torch first: otherwise another package may pull in a build of its own choice
  pip_install=(python -m pip install --quiet --disable-pip-version-check)
  pip_install+=(--constraint constraints.txt)
  "${pip_install[@]}" torch
  "${pip_install[@]}" --editable "$install"
  touch "$stamp"
fi
