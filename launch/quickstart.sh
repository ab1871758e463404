#!/usr/bin/env bash
# A fresh machine to a finished run: makes .venv, installs, trains configs/quickstart.yaml on Ray with two workers.
# Words given are handed on: bash launch/quickstart.sh run.name=again
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/install.sh
source launch/install.sh
exec orchestrator train configs/quickstart.yaml "$@"
