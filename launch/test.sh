#!/usr/bin/env bash
# A fresh machine to a tested one: makes .venv, installs with the test extra, runs every test that is not marked slow.
# On a worker for each core, four at most (tests/conftest.py says what may run at once).
# Words given are handed to pytest instead: bash launch/test.sh -m slow
set -euo pipefail
cd "$(dirname "$0")/.."
export INSTALL=".[test]"
# shellcheck source=launch/install.sh
source launch/install.sh
if [ $# -eq 0 ]; then
  cores=$(nproc)
  # the groups in the order that conftest.py gives them, not the largest first
  set -- -m "not slow and not gpu" -n $((cores < 4 ? cores : 4)) --dist loadgroup --no-loadscope-reorder --durations 15
fi
exec python -m pytest "$@"
