# Start and stop a Ray cluster on the nodes of a job: start_ray, stop_ray.
# Sourced by train.sbatch, after job.sh.
# shellcheck shell=bash disable=SC2154 # run_dir and received are set in job.sh

: "${NODES_TIMEOUT_S:=300}" # seconds that all nodes have to join
declare -A steps=()         # node -> process of the srun that runs Ray there
token=                      # file with the token that this job's Ray requires

# Return when all nodes have joined RAY_ADDRESS or a signal has arrived; end the job if one does not
# join.
start_ray() {
  local nodes node head address base deadline=$((SECONDS + NODES_TIMEOUT_S))
  mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  head=${nodes[0]}
  address=$(address_towards "${nodes[-1]}")
  base=$(first_port)
  export RAY_ADDRESS=$address:$base
  export RAY_USAGE_STATS_ENABLED=0
  # default 15: any other process on the node would go first
  export RAY_worker_niceness="${RAY_worker_niceness:-0}"
  export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 # else TERM takes 30 s
  make_token
  local options=(
    --block --disable-usage-stats --log-color=false
    --object-store-memory=500000000 # nothing large is stored in it
    --node-manager-port=$((base + 1)) --object-manager-port=$((base + 2))
    --runtime-env-agent-port=$((base + 3))
    --dashboard-agent-grpc-port=$((base + 4)) --dashboard-agent-listen-port=$((base + 5))
    --metrics-export-port=$((base + 6))
    --min-worker-port=$((base + 20)) --max-worker-port=$((base + 499))
  )
  say "head $RAY_ADDRESS, nodes ${nodes[*]}"
  # a separate folder: on a node that several users share, /tmp/ray belongs to the first
  hold_ray "$head" --head --node-ip-address="$address" --port="$base" \
    --ray-client-server-port=$((base + 7)) --include-dashboard=false \
    --temp-dir="${RAY_TMPDIR:-/tmp}/ray-$SLURM_JOB_ID" "${options[@]}"
  joined "$deadline" "$head" || return 0
  for node in "${nodes[@]:1}"; do hold_ray "$node" --address="$RAY_ADDRESS" "${options[@]}"; done
  joined "$deadline" "${nodes[@]:1}" || return 0
}

stop_ray() {
  local node patience=$((SECONDS + 10))
  signal_steps USR2 || true # to on_node
  while signal_steps 0 && [ "$SECONDS" -lt "$patience" ]; do sleep 0.1; done
  signal_steps TERM || true # to srun itself, if a node does not answer
  for node in "${!steps[@]}"; do await "${steps[$node]}" 2>/dev/null || true; done
  steps=()
  [ -z "$token" ] || rm -f "$token"
}

# Signal all steps, and return 0 if any is still running: signal_steps SIGNAL
signal_steps() {
  local pid alive=1
  for pid in "${steps[@]}"; do
    if kill -s "$1" "$pid" 2>/dev/null; then alive=0; fi
  done
  return "$alive"
}

log_of() { echo "$run_dir/logs/ray-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}-$1.log"; }

# Print the address of this node on the route to another one. Its host name may resolve to loopback.
address_towards() {
  local other
  other=$(scontrol -o show node "$1" | grep -o 'NodeAddr=[^ ]*')
  python3 -c '
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    probe.connect((sys.argv[1], 1))  # sends nothing
    print(probe.getsockname()[0])' "${other#NodeAddr=}"
}

# Print the first of 500 ports below the ephemeral ones, any of which a process could take before
# Ray does. The job's number selects the 500; if they are in use on this node, the next free ones
# are used.
first_port() {
  python3 -c '
import socket, sys

def is_free(base):
    try:
        for n in range(8):
            socket.create_server(("", base + n)).close()
    except OSError:
        return False
    return True

bases = [10000 + (int(sys.argv[1]) + n) % 40 * 500 for n in range(40)]
print(next(filter(is_free, bases), bases[0]))' "$SLURM_JOB_ID"
}

# Create the token in the run directory, which every node sees. Other users can read neither the
# file nor, in an environment, its text.
make_token() {
  token=$run_dir/logs/.ray-token-$SLURM_JOB_ID
  rm -f "$token"
  (umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$token")
  unset RAY_AUTH_TOKEN
  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token
}

# Run Ray on a node: hold_ray NODE OPTION...
hold_ray() {
  local node=$1
  shift
  srun --overlap --export=ALL --nodes=1 --ntasks=1 --nodelist="$node" --cpu-bind=none \
    bash -c "$(declare -f on_node); on_node \"\$@\"" on_node "$@" >"$(log_of "$node")" 2>&1 &
  steps[$node]=$!
}

# Runs on the node itself. scancel sends TERM only to this shell, which ignores it, so Ray runs
# until the run is saved.
on_node() {
  trap : TERM
  trap 'exit 0' USR2 # Slurm then kills the rest of the step
  local try began code ray
  for try in 1 2 3; do
    began=$SECONDS
    ray start --num-cpus="$SLURM_CPUS_ON_NODE" "$@" &
    ray=$!
    while :; do
      code=0
      wait "$ray" || code=$?
      kill -0 "$ray" 2>/dev/null || break # otherwise a signal ended the wait
    done
    # restart a Ray that ends early: on a busy node its parts may not wait long enough for each
    # other (ray#65983)
    if [ $((SECONDS - began)) -gt 60 ] || [ "$code" = 0 ] || [ "$code" = 127 ]; then break; fi
    echo "Ray ended with code $code at its start, try $try"
    sleep 1
  done
  return "$code"
}

# Wait until these nodes have joined (return 0) or a signal has arrived (return 1): joined DEADLINE
# NODE...
joined() {
  local deadline=$1 node late
  shift
  while :; do
    late=()
    for node in "$@"; do
      grep -qs 'Ray runtime started' "$(log_of "$node")" || late+=("$node")
    done
    [ ${#received[@]} = 0 ] || return 1
    [ ${#late[@]} != 0 ] || return 0
    for node in "${late[@]}"; do
      kill -0 "${steps[$node]}" 2>/dev/null || absent "Ray has ended there" "$node"
    done
    [ "$SECONDS" -lt "$deadline" ] || absent "no Ray there after $NODES_TIMEOUT_S s" "${late[@]}"
    sleep 0.2
  done
}

# End the job with an error: absent REASON NODE...
absent() {
  local reason=$1 node names logs=()
  shift
  for node in "$@"; do logs+=("$(log_of "$node")"); done
  names=$(IFS=,; echo "$*")
  local again="submit again with --exclude=$names, or with a longer NODES_TIMEOUT_S"
  fail node "$names" "$reason, but training needs every node of the job" \
    "look into ${logs[*]}; then $again"
}
