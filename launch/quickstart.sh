#!/usr/bin/env bash
# From a fresh machine to a finished run: create .venv, install, and train configs/quickstart.yaml
# on Ray with two workers. Arguments are passed on: bash launch/quickstart.sh run.name=again
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/install.sh
source launch/install.sh
exec orchestrator train configs/quickstart.yaml "$@"
