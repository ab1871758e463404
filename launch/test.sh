#!/usr/bin/env bash
# From a fresh machine to a test run: install Debian's Slurm and a few tools if possible, create
# .venv with the test extra, and run every test that is not marked slow. Tools that cannot be
# installed are named, and their tests are skipped. There is one worker per core, at most four (see
# tests/conftest.py). Arguments replace those of pytest: bash launch/test.sh -m slow
set -euo pipefail
cd "$(dirname "$0")/.."

declare -A package_of=(
  [slurmctld]=slurm-wlm [shellcheck]=shellcheck [nft]=nftables
  [faketime]=faketime [ip]=iproute2 [ps]=procps
)
missing=()
for tool in "${!package_of[@]}"; do
  command -v "$tool" >/dev/null || missing+=("${package_of[$tool]}")
done
if [ ${#missing[@]} != 0 ]; then
  if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
    echo "tests of ${missing[*]} are skipped: only root on Debian can install these here"
  elif ! output=$({ apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends "${missing[@]}"; } 2>&1); then
    echo "tests of ${missing[*]} are skipped: $(tail -n 1 <<<"$output")"
  fi
fi

export INSTALL=".[test]"
export PIP_COMPILE=0  # Python compiles what the tests import: a fraction of it
unset PYTHONDONTWRITEBYTECODE  # with it every process of a test would compile all of that anew
# shellcheck source=launch/install.sh
source launch/install.sh
if [ $# -eq 0 ]; then
  cores=$(nproc)
  # groups in the order of conftest.py, not the largest first
  workers=$((cores < 4 ? cores : 4))
  set -- -m "not slow and not gpu" -n "$workers" --dist loadgroup --no-loadscope-reorder \
    --durations 15
fi
exec python -m pytest "$@"
