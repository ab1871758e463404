#!/usr/bin/env bash
# A fresh machine to a tested one: makes .venv, installs with the test extra, runs every test that is not marked slow.
# Words given are handed to pytest: bash launch/test.sh -m slow
set -euo pipefail
cd "$(dirname "$0")/.."
export INSTALL=".[test]"
# shellcheck source=launch/install.sh
source launch/install.sh
if [ $# -eq 0 ]; then set -- -m "not slow and not gpu"; fi
exec python -m pytest "$@"
