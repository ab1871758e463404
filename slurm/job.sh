# The part that batch scripts share: find the program, wait for it while handling signals, end or
# requeue the job. Sourced by the scripts beside it, which define ask_to_stop SIGNAL.
# shellcheck shell=bash

run_dir=            # set by plan
declare -a received # signals so far, in order; scripts record them before they source this file
STOPPED=3           # exit code of a run that was saved and can resume

trap 'on_signal USR1' USR1
trap 'on_signal TERM' TERM
trap 'on_signal HUP' HUP

say() { echo "[$(date +%T) $HOSTNAME, start $((${SLURM_RESTART_COUNT:-0} + 1))] $*"; }

# End the job with an error: fail KEY VALUE RULE CURE
fail() {
  echo "error: $1 = $2: $3; $4" >&2
  exit 1
}

on_signal() {
  received+=("$1")
  say "received $1"
  ask_to_stop "$1" || true # the program may not have started yet
}

has_received() { [[ " ${received[*]} " == *" $1 "* ]]; }

# Return the exit code of a background process, however often a signal interrupts. bash runs traps
# only in `wait` and between commands, so nothing that takes long may run in the foreground.
await() {
  local seen code
  while :; do
    seen=${#received[@]} code=0
    wait "$1" || code=$?
    [ "${#received[@]}" != "$seen" ] || return "$code"
  done
}

find_orchestrator() {
  [ -z "${VIRTUAL_ENV:-}" ] || PATH=$VIRTUAL_ENV/bin:$PATH
  command -v orchestrator >/dev/null ||
    fail VIRTUAL_ENV "${VIRTUAL_ENV:-(not set)}" \
      "node $HOSTNAME finds no orchestrator in its bin, nor on PATH" \
      "submit with the virtual environment active, and have it where every node sees it"
}

# Reject wrong settings before any node is used, and set run_dir.
plan() {
  local facts code=0
  facts=$(mktemp)
  orchestrator plan --json "$@" >"$facts" &
  await $! || code=$?
  [ "$code" = 0 ] || exit "$code"
  run_dir=$(python3 -c 'import json, sys; print(json.load(sys.stdin)["run_dir"])' <"$facts")
  rm "$facts"
  mkdir -p "$run_dir/logs"
}

# End the job with the exit code of the program, or requeue it if its time was up and the run can
# continue.
conclude() {
  local code=$1 signal
  for signal in "${received[@]}"; do
    # killed by the signal that was passed on: it had no handler yet, so there was nothing to save
    [ "$code" != $((128 + $(kill -l "$signal"))) ] || code=$STOPPED
  done
  # not after TERM: Slurm would restart a cancelled job
  if [ "$code" = "$STOPPED" ] && has_received USR1 && ! has_received TERM; then requeue; fi
  say "exit code $code"
  exit "$code"
}

# Requeue the job and exit; return if it must not be requeued.
requeue() {
  local parse='import json, sys; print(json.load(open(sys.argv[1]))["reason"].partition(", with ")[2])'
  local newest=none filled mark each starts=$run_dir/logs/requeues-$SLURM_JOB_ID
  for each in "$run_dir"/checkpoints/step_*/manifest.json; do
    [ ! -e "$each" ] || newest=$(basename "$(dirname "$each")")
  done
  # a start that only filled the reference cache got on, too: the reason of its stop says how far
  filled=$(python3 -c "$parse" "$run_dir/result.json" 2>/dev/null || true)
  mark=$newest${filled:+ $filled}
  echo "$mark" >>"$starts"
  if [ "$(tail -n 3 "$starts" | grep -cxF -- "$mark")" = 3 ]; then
    echo "error: --time = $(squeue -h -j "$SLURM_JOB_ID" -o %l):" \
      "three starts in a row wrote no new checkpoint (newest: $newest)," \
      "so the job is not requeued; lengthen it, or lower checkpoint.every_steps" >&2
    return 0
  fi
  trap '' TERM # the requeue sends it
  [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" = RUNNING ] || return 0 # it was cancelled
  say "requeued, to continue from checkpoint: $newest"
  if scontrol requeue "$SLURM_JOB_ID"; then exit 0; fi
}
