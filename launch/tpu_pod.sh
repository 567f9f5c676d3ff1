#!/usr/bin/env bash
# launch/tpu_pod.sh COMMAND NAME --zone=ZONE [options] [-- ARGUMENTS OF semiseg_jax.main]
#
# Runs training on a Cloud TPU of one or several hosts. One command performs the whole run, and
# resumes it after any interruption:
#
#   train    requests the TPU if there is none, waits for it, copies the project, sets up, starts the
#            run, and monitors it until it is complete; if the TPU is preempted, requests another
#            and resumes the run
#
# The single steps:
#
#   create   creates the TPU at once, or fails if there is no capacity
#   queue    requests the TPU, which is created when there is capacity
#   copy     copies the project folder in its current state to all workers
#   setup    installs Python and the requirements on all workers
#   data     copies the data to all workers
#   run      starts the run on all workers, detached; no effect if it is already running
#   logs     prints the end of a worker's log
#   status   prints the state of the request, of the TPU and of the run
#   stop     makes the run save and exit; the TPU still runs and is charged
#   delete   deletes the TPU and the request for it, which ends their charges
#
#   --zone=ZONE               zone of the TPU
#   --project=ID              Google Cloud project; default: that of gcloud
#   --accelerator-type=TYPE   such as v5litepod-16, v6e-8; required by create, queue and train
#   --runtime-version=V       software version of the machines; default: Google's for JAX on the type
#   --spot                    use a spot TPU: cheaper, may be preempted at any time
#   --data=gs://FOLDER        data and train: data that each worker copies to data/FOLDER in its
#                             project
#   --worker=K                logs: number of the worker; default 0
#   --follow                  logs: keep printing new lines
#   --poll=S                  train: seconds between two checks; default 60
#   --then-delete             train: delete the TPU when the run is complete
#   --create-flag=FLAG        create, queue, train: a further flag of gcloud; may be repeated
#   --ssh-flag=FLAG           a further flag of gcloud's ssh and scp, such as
#                             --ssh-flag=--internal-ip; may be repeated
#   --dry-run                 prints the commands, as if no TPU existed yet (delete: as if one
#                             existed), and runs nothing
#   --help                    prints this text
#
#   launch/tpu_pod.sh train mine --zone=us-west4-a --accelerator-type=v5litepod-16 --spot \
#     --data=gs://BUCKET/cityscapes -- --config=configs/cityscapes.py:1_8 --workdir=gs://BUCKET/run
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

WORKER=semiseg/project/launch/tpu_worker.sh
# EX_TEMPFAIL of sysexits.h, as in semiseg_jax.main: interrupted, start again.
INTERRUPTED=75

task='' name='' zone='' project='' type='' version='' spot=no data='' worker=0 follow=no poll=60
then_delete=no create_flags=() ssh_flags=() arguments=()

read_command() {
  while (($#)); do
    case $1 in
      --zone=*) zone=${1#*=} ;;
      --project=*) project=${1#*=} ;;
      --accelerator-type=*) type=${1#*=} ;;
      --runtime-version=*) version=${1#*=} ;;
      --spot) spot=yes ;;
      --data=*) data=${1#*=} ;;
      --worker=*) worker=${1#*=} ;;
      --follow) follow=yes ;;
      --poll=*) poll=${1#*=} ;;
      --then-delete) then_delete=yes ;;
      --create-flag=*) create_flags+=("${1#*=}") ;;
      --ssh-flag=*) ssh_flags+=("${1#*=}") ;;
      --dry-run) DRY_RUN=yes ;;
      --help | -h) usage && exit 0 ;;
      --) shift && arguments=("$@") && break ;;
      -*) misused "$1 is not an option here: what is for semiseg_jax.main comes after --." ;;
      *)
        [[ -z $name ]] || misused "$1 is one argument too many."
        if [[ -z $task ]]; then task=$1; else name=$1; fi
        ;;
    esac
    shift
  done
}

check_command() {
  case $task in
    train | create | queue | copy | setup | data | run | logs | status | stop | delete) ;;
    *) misused "'$task' is not a command: give one of those above." ;;
  esac
  [[ -n $name ]] || misused "Give the TPU a name."
  [[ -n $zone ]] || misused "Give its zone, such as --zone=us-west4-a."
  need_count --poll "$poll"
  if [[ $task =~ ^(train|create|queue)$ ]]; then
    [[ -n $type ]] || misused "Give the TPU's type, such as --accelerator-type=v5litepod-16."
    choose_version
  fi
  if [[ $task == data || -n $data ]]; then
    [[ $data == gs://?* ]] || misused "--data is '$data': give a folder as gs://BUCKET/FOLDER."
  fi
  if [[ $task =~ ^(train|run)$ ]]; then
    ((${#arguments[@]})) || misused "Say what to run, such as -- --config=configs/streets.py."
    check_workdir
  fi
}

# Sets `version` by Google's table for JAX: https://cloud.google.com/tpu/docs/runtimes
choose_version() {
  [[ -z $version ]] || return 0
  case $type in
    v6e-*) version=v2-alpha-tpuv6e ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v[234]-*) version=tpu-ubuntu2204-base ;;
    *) misused "No software version is known here for $type: give it with --runtime-version=." ;;
  esac
}

# The workdir must be in a bucket: workers share no disk, and that of a preempted worker is lost.
check_workdir() {
  local argument
  for argument in "${arguments[@]}"; do
    if [[ $argument == --workdir=gs://?* ]]; then return; fi
  done
  misused "Give the run a workdir that all workers share and that stays: --workdir=gs://BUCKET/RUN."
}

# Sets `command` to gcloud compute tpus ARGUMENTS… with the zone and the project.
tpus() {
  command=(gcloud compute tpus "$@" "--zone=$zone")
  [[ -z $project ]] || command+=("--project=$project")
}

# Runs line $2 in the shell of worker $1, a number or `all`.
on_workers() {
  local command
  tpus tpu-vm ssh "$name"
  act "${command[@]}" "--worker=$1" --quiet ${ssh_flags[@]+"${ssh_flags[@]}"} "--command=$2"
}

create() {
  local command
  tpus tpu-vm create "$name"
  command+=("--accelerator-type=$type" "--version=$version")
  [[ $spot == no ]] || command+=(--spot)
  act "${command[@]}" ${create_flags[@]+"${create_flags[@]}"}
}

queue() {
  local command
  tpus queued-resources create "$name"
  command+=("--node-id=$name" "--accelerator-type=$type" "--runtime-version=$version")
  [[ $spot == no ]] || command+=(--spot)
  act "${command[@]}" ${create_flags[@]+"${create_flags[@]}"}
}

# Prints the state of this TPU (tpu-vm) or of the request for it (queued-resources); nothing if there
# is none. Uses `list` because it fails only if the state is unknown.
state_of() {
  local command field=state listed line_name line_state
  [[ $1 == tpu-vm ]] || field=state.state
  tpus "$1" list
  listed=$(act "${command[@]}" "--format=value(name.basename(),$field)") || return
  while read -r line_name line_state; do
    if [[ $line_name == "$name" ]]; then printf '%s' "$line_state"; fi
  done <<<"$listed"
}

# Each step returns on failure, because train calls this function where set -e has no effect.
copy() {
  local command archive=${TMPDIR:-/tmp}/semiseg_jax-$name.tar.gz
  act tar -czf "$archive" -C "$PROJECT" --exclude=./.git '--exclude=./.venv*' \
    '--exclude=./.*_cache' --exclude=./data --exclude=./runs --exclude=__pycache__ \
    . || return
  tpus tpu-vm scp "$archive" "$name:semiseg_jax.tar.gz"
  act "${command[@]}" --worker=all --quiet ${ssh_flags[@]+"${ssh_flags[@]}"} || return
  act rm "$archive" || return
  local unpack='rm -rf semiseg/project && mkdir -p semiseg/project semiseg/data'
  unpack+=' && tar -xzf semiseg_jax.tar.gz -C semiseg/project && rm semiseg_jax.tar.gz'
  on_workers all "$unpack && ln -s ../data semiseg/project/data"
}

setup() {
  on_workers all "bash $WORKER setup"
}

copy_data() {
  on_workers all "bash $WORKER data $(quoted "$data")"
}

run() {
  on_workers all "bash $WORKER run $(quoted "${arguments[@]}")"
}

logs() {
  local options='-n 100'
  [[ $follow == no ]] || options+=' -F'
  on_workers "$worker" "tail $options semiseg/run.log"
}

# Prints one line per worker; see tpu_worker.sh.
run_status() {
  on_workers all "if [ -e $WORKER ]; then bash $WORKER status; else echo semiseg - none; fi"
}

stop() {
  on_workers all "bash $WORKER stop"
}

status() {
  local request node
  request=$(state_of queued-resources)
  node=$(state_of tpu-vm)
  say "request: ${request:-none}"
  say "TPU: ${node:-none}"
  if [[ $node == READY || $DRY_RUN == yes ]]; then run_status; fi
}

delete() {
  local command state
  state=$(state_of queued-resources)
  if [[ -n $state || $DRY_RUN == yes ]]; then
    tpus queued-resources delete "$name"
    act "${command[@]}" --force --quiet
  fi
  state=$(state_of tpu-vm)
  if [[ -n $state || $DRY_RUN == yes ]]; then
    tpus tpu-vm delete "$name"
    act "${command[@]}" --quiet
  fi
}

start_run() {
  copy && setup && { [[ -z $data ]] || copy_data; } && run
}

# Makes one step towards a ready TPU; sets `node` to the state of the TPU.
approach() {
  local request
  node=''
  node=$(state_of tpu-vm) || return
  [[ $node != READY ]] || return 0
  request=$(state_of queued-resources) || return
  say "TPU: ${node:-none}; request: ${request:-none}"
  case $node,$request in
    PREEMPTED,* | TERMINATED,* | *,SUSPENDED) delete && queue ;;
    STOPPED,* | HIDDEN,*) fail "$name is $node: start it with gcloud, or delete it." ;;
    *,FAILED) fail "The request for $name failed (quota, type or zone): see status, then delete." ;;
    ,) queue ;;
    *) sleep "$poll" ;;
  esac
}

# Reduces the status lines of the workers ($1) to one word: running, none, stopped, or a status.
outcome() {
  local line whole=0
  while read -r line; do
    case $line in
      "semiseg "*" running") printf running && return ;;
      "semiseg "*" none") whole=none ;;
      "semiseg "*" stopped") [[ $whole == none ]] || whole=stopped ;;
      "semiseg "*" ended 0") ;;
      "semiseg "*" ended "*)
        # A failure takes precedence over an interruption.
        case $whole in 0 | "$INTERRUPTED") whole=${line##* } ;; esac
        ;;
    esac
  done <<<"$1"
  printf '%s' "$whole"
}

# Ends train with the outcome $1 of the run.
end_with() {
  case $1 in
    0)
      say "The run is complete."
      if [[ $then_delete == yes ]]; then delete; else say "The TPU still runs and is charged: delete it."; fi
      exit 0
      ;;
    stopped)
      say "The run was stopped; the TPU still runs and is charged. The same command continues the run."
      exit "$INTERRUPTED"
      ;;
  esac
  logs || true
  printf 'Error: %s\n' "The run ended with status $1, as the log above says; the TPU still runs and is charged." >&2
  exit "$1"
}

# Checks the run; starts it if necessary, or ends train. Returns 1 if the TPU cannot be reached.
look() {
  local lines whole
  lines=$(run_status) || return
  whole=$(outcome "$lines")
  if [[ $whole == running ]]; then
    started=yes failed=''
  # The outcome of a run before this command does not count.
  elif [[ $started == no || $whole == none || $whole == "$INTERRUPTED" ]]; then
    say "Starting the run."
    start_run || return
    started=yes failed=''
  # In a preemption some workers fail for lack of others before the state of the TPU shows it.
  elif [[ $whole == 0 || $whole == stopped || $whole == "$failed" ]]; then
    end_with "$whole"
  else
    failed=$whole
  fi
}

train() {
  local node started=no failed='' misses=0
  while :; do
    if approach; then
      [[ $node == READY ]] || continue
      if look; then misses=0; else misses=$((misses + 1)); fi
    else
      misses=$((misses + 1))
    fi
    # A TPU under preemption does not answer until its state shows it: that is no failure yet.
    ((misses < 10)) || fail "$name cannot be reached or set up: see the messages above."
    sleep "$poll"
  done
}

# Prints the commands of train in the order of a run without failures.
dry_train() {
  state_of tpu-vm && state_of queued-resources && queue
  say "when it is READY:"
  run_status && start_run
  say "every $poll s, until it says: ended 0"
  run_status
  if [[ $then_delete == yes ]]; then delete; fi
}

read_command "$@"
check_command
case $task in
  data) copy_data ;;
  train) if [[ $DRY_RUN == yes ]]; then dry_train; else train; fi ;;
  *) "$task" ;;
esac
