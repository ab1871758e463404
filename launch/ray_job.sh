#!/usr/bin/env bash
# A run handed to a Ray cluster, its log followed, its exit code returned:
#   bash launch/ray_job.sh --address http://HEAD:8265 my.yaml key=value ...
set -euo pipefail
exec orchestrator submit --to ray "$@"
