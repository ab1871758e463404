#!/usr/bin/env bash
# A fresh machine to a tested one: installs Debian's Slurm and a few tools where it may, makes .venv with the test extra,
# runs every test that is not marked slow. What cannot be installed is named, and its tests are skipped.
# On a worker for each core, four at most (tests/conftest.py says what may run at once).
# Words given are handed to pytest instead: bash launch/test.sh -m slow
set -euo pipefail
cd "$(dirname "$0")/.."

declare -A package_of=(
  [slurmctld]=slurm-wlm [shellcheck]=shellcheck [nft]=nftables [faketime]=faketime [ip]=iproute2 [ps]=procps
)
missing=()
for tool in "${!package_of[@]}"; do
  command -v "$tool" >/dev/null || missing+=("${package_of[$tool]}")
done
if [ ${#missing[@]} != 0 ]; then
  if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
    echo "tests of ${missing[*]} are skipped: only root on Debian can install these here"
  elif ! said=$({ apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends "${missing[@]}"; } 2>&1); then
    echo "tests of ${missing[*]} are skipped: $(tail -n 1 <<<"$said")"
  fi
fi

export INSTALL=".[test]"
export PIP_COMPILE=0  # Python compiles what the tests import: a fraction of it
# shellcheck source=launch/install.sh
source launch/install.sh
if [ $# -eq 0 ]; then
  cores=$(nproc)
  # the groups in the order that conftest.py gives them, not the largest first
  set -- -m "not slow and not gpu" -n $((cores < 4 ? cores : 4)) --dist loadgroup --no-loadscope-reorder --durations 15
fi
exec python -m pytest "$@"
