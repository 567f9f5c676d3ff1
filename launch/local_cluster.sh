#!/usr/bin/env bash
# launch/local_cluster.sh N [options] -- ARGUMENTS OF semiseg_jax.main
#
# Runs one training run as N processes on this machine, as they would run on N hosts.
#
#   --devices=K   CPU devices of each process, instead of the machine's own devices
#   --port=PORT   port of the coordinator; default: a free one from 20000 to 29999
#   --grace=S     seconds from the failure of one process until the others are killed; default 60
#   --python=P    the interpreter; default: .venv/bin/python of this project
#   --dry-run     prints the commands and runs nothing
#   --help        prints this text
#
# Paths are relative to the project's folder. Each line of output starts with the number of its
# process. SIGTERM, SIGINT and SIGHUP are forwarded to all processes. The exit status is that of the
# first process that failed; 75 means interrupted: the same command resumes the run.
#
#   launch/local_cluster.sh 2 --devices=2 -- --config=configs/streets.py
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

count='' devices='' port='' grace=60 python=$PROJECT/.venv/bin/python arguments=()

read_command() {
  while (($#)); do
    case $1 in
      --devices=*) devices=${1#*=} && need_count --devices "$devices" ;;
      --port=*) port=${1#*=} && need_count --port "$port" ;;
      --grace=*) grace=${1#*=} && need_count --grace "$grace" ;;
      --python=*) python=${1#*=} ;;
      --dry-run) DRY_RUN=yes ;;
      --help | -h) usage && exit 0 ;;
      --) shift && arguments=("$@") && break ;;
      -*) misused "$1 is not an option here: what is for semiseg_jax.main comes after --." ;;
      *) [[ -z $count ]] || misused "$1 is one argument too many." && count=$1 ;;
    esac
    shift
  done
  need_count N "$count"
  ((${#arguments[@]})) || misused "Say what to run, such as -- --config=configs/streets.py."
}

# Prints a free port, below the range that systems use for outgoing connections.
free_port() {
  local candidate
  for _ in {1..100}; do
    candidate=$((20000 + RANDOM % 10000))
    if ! (exec 3<>"/dev/tcp/127.0.0.1/$candidate") 2>/dev/null; then
      printf '%s' "$candidate"
      return
    fi
  done
  fail "No free port was found from 20000 to 29999: give one with --port=."
}

# Sets `command` to the command of process $1.
command_of() {
  command=(env "SEMISEG_COORDINATOR=127.0.0.1:$port" "SEMISEG_NUM_PROCESSES=$count"
    "SEMISEG_PROCESS_ID=$1")
  [[ -z $devices ]] || command+=(JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=$devices")
  command+=("$python" -m semiseg_jax.main "${arguments[@]}")
}

# Process ids: of the processes that have not ended, and of the printers of their output.
pids=() printers=()

# Sends signal $1 to each process that has not ended, and to its children.
signal_all() {
  local i
  for i in "${!pids[@]}"; do
    kill -s "$1" -- "-${pids[i]}" 2>/dev/null || true
  done
}

forwarded=no starting=no pending=''
# shellcheck disable=SC2329 # called by the traps
forward() {
  forwarded=yes
  # The id of a process that is being started is not in `pids` yet.
  if [[ $starting == yes ]]; then pending=$1; else signal_all "$1"; fi
}

start() {
  local i out command
  starting=yes
  for ((i = 0; i < count && ${#pending} == 0; i++)); do
    command_of "$i"
    # The printer ends when its process closes its output: Ctrl-C must not end it earlier.
    exec {out}> >(trap '' INT TERM HUP && exec sed -u "s/^/[$i] /")
    printers+=($!)
    "${command[@]}" </dev/null >&"$out" 2>&1 3>&- {out}>&- &
    pids+=($!)
    exec {out}>&-
  done
  starting=no
  [[ -z $pending ]] || signal_all "$pending"
}

# Waits for all processes; sets `first` to the first exit status that is not 0.
first=0
watch() {
  local never i status deadline=''
  # Waiting in a builtin, on a pipe that is always empty, so that traps run at once.
  exec {never}<> <(:)
  while ((${#pids[@]})); do
    for i in "${!pids[@]}"; do
      # No subshell here, such as `jobs` needs: a signal that arrives while it starts may be lost.
      if kill -0 "${pids[i]}" 2>/dev/null; then continue; fi
      status=0
      wait "${pids[i]}" || status=$?
      # Ends the children that it left running.
      kill -s KILL -- "-${pids[i]}" 2>/dev/null || true
      unset "pids[i]"
      if ((status && !first)); then
        first=$status deadline=$((SECONDS + grace))
        printf 'Process %s ended with status %s.\n' "$i" "$status" >&2
        # After status 75 all processes are saving: a second signal would end them too early.
        if ((status != 75)) && [[ $forwarded == no ]]; then signal_all TERM; fi
      fi
    done
    if [[ -n $deadline ]] && ((SECONDS >= deadline && ${#pids[@]})); then
      printf 'Still running %s s later, so killed: process %s.\n' "$grace" "${!pids[*]}" >&2
      signal_all KILL
      deadline=$((SECONDS + grace))
    fi
    read -rt 0.1 -u "$never" || true
  done
}

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) ||
  fail "This is bash $BASH_VERSION: this script needs 4.4 or newer."
read_command "$@"
[[ -n $port ]] || port=$(free_port)
if [[ $DRY_RUN == yes ]]; then
  act cd "$PROJECT"
  for ((i = 0; i < count; i++)); do
    command_of "$i"
    printf '%s &\n' "$(quoted "${command[@]}")"
  done
  printf 'wait\n'
  exit
fi
cd "$PROJECT"
command -v "$python" >/dev/null || fail "$python is missing: run make setup, or give --python=."

# Each process has its own process group: Ctrl-C reaches only this script, which forwards it once.
set -m
trap 'signal_all KILL' EXIT
trap 'forward TERM' TERM HUP
trap 'forward INT' INT
start
watch
wait "${printers[@]}" 2>/dev/null || true
# Processes that a signal ended (before they could save, or by a second signal) or that were never
# started because of one also count as interrupted.
if [[ $forwarded == yes ]] && ((first > 128 || ${#printers[@]} < count)); then first=75; fi
exit "$first"
