#!/usr/bin/env bash
# Submit a run to a Ray cluster, follow its log and return its exit code:
#   bash launch/ray_job.sh --address http://HEAD:8265 my.yaml key=value ...
set -euo pipefail
exec orchestrator submit --to ray "$@"
