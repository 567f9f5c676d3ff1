#!/usr/bin/env bash
# launch/tpu_pod.sh COMMAND NAME --zone=ZONE [options] [-- ARGUMENTS OF semiseg_jax.main]
#
# Runs on a Cloud TPU, of one host or many. For a whole run, from nothing to its end, and the same
# again to go on after anything:
#
#   train    asks for the TPU where there is none, waits for it, copies, sets up, runs, and watches
#            until the run is complete; where the TPU is preempted, asks for another and goes on
#
# And its steps, one by one:
#
#   create   makes the TPU at once, or fails where there is no capacity
#   queue    asks for the TPU, which comes when there is capacity
#   copy     copies the project to all workers, as it is in the working folder
#   setup    installs Python and the requirements on all workers
#   data     copies the data to all workers
#   run      starts the run on all workers, detached; nothing where it is under way
#   logs     prints the end of a worker's log
#   status   tells what there is, and whether it runs
#   stop     tells the run to save and to end; the TPU stays, and costs
#   delete   deletes the TPU and the request for it; nothing costs any more
#
#   --zone=ZONE               of the TPU
#   --project=ID              of the bill; gcloud's default unless given
#   --accelerator-type=TYPE   such as v5litepod-16, v6e-8; needed by create, queue and train
#   --runtime-version=V       of the machine's software; Google's for JAX on that type unless given
#   --spot                    cheaper, and may be taken away at any time
#   --data=gs://FOLDER        data that each worker copies to data/ in its project, as data/FOLDER;
#                             for data and train
#   --worker=K                whose log; 0 unless given
#   --follow                  logs: go on printing
#   --poll=S                  train: seconds between two looks; 60 unless given
#   --then-delete             train: delete the TPU when the run is complete
#   --create-flag=FLAG        a further flag of gcloud for create, queue and train; may be repeated
#   --ssh-flag=FLAG           a further flag of gcloud for its ssh and scp, such as
#                             --ssh-flag=--internal-ip; may be repeated
#   --dry-run                 prints the commands, as if there were no TPU yet (delete: as if there
#                             were one), and runs nothing
#   --help                    prints this
#
#   launch/tpu_pod.sh train mine --zone=us-west4-a --accelerator-type=v5litepod-16 --spot \
#     --data=gs://BUCKET/cityscapes -- --config=configs/cityscapes.py:1_8 --workdir=gs://BUCKET/run
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

WORKER=semiseg/project/launch/tpu_worker.sh
# sysexits.h: interrupted, start again; as of semiseg_jax.main.
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

# Google's table of software versions for JAX: https://cloud.google.com/tpu/docs/runtimes
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

# Workers share no disk, and a preempted one leaves none.
check_workdir() {
  local argument
  for argument in "${arguments[@]}"; do
    if [[ $argument == --workdir=gs://?* ]]; then return; fi
  done
  misused "Give the run a workdir that all workers share and that stays: --workdir=gs://BUCKET/RUN."
}

# gcloud compute tpus WHAT… of this place; sets `command`.
tpus() {
  command=(gcloud compute tpus "$@" "--zone=$zone")
  [[ -z $project ]] || command+=("--project=$project")
}

# Has the shell of worker $1, or of all, run line $2.
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

# The state of this TPU (tpu-vm), or of the request for it (queued-resources): nothing where there
# is none. A list, because it fails only where the answer is not known.
state_of() {
  local command field=state listed line_name line_state
  [[ $1 == tpu-vm ]] || field=state.state
  tpus "$1" list
  listed=$(act "${command[@]}" "--format=value(name.basename(),$field)") || return
  while read -r line_name line_state; do
    if [[ $line_name == "$name" ]]; then printf '%s' "$line_state"; fi
  done <<<"$listed"
}

# The steps of copying are joined by && because train calls them where set -e does not hold.
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

# One line for each worker; see tpu_worker.sh.
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

# Brings the TPU nearer to being ready; sets `node` to its state.
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

# What the workers' lines say together, in one word: running, none, stopped, or a status.
outcome() {
  local line whole=0
  while read -r line; do
    case $line in
      "semiseg "*" running") printf running && return ;;
      "semiseg "*" none") whole=none ;;
      "semiseg "*" stopped") [[ $whole == none ]] || whole=stopped ;;
      "semiseg "*" ended 0") ;;
      "semiseg "*" ended "*)
        # A failure explains more than an interruption.
        case $whole in 0 | "$INTERRUPTED") whole=${line##* } ;; esac
        ;;
    esac
  done <<<"$1"
  printf '%s' "$whole"
}

# Ends train where the run is at its end.
end_with() {
  case $1 in
    0)
      say "The run is complete."
      if [[ $then_delete == yes ]]; then delete; else say "The TPU stays, and costs: delete it."; fi
      exit 0
      ;;
    stopped)
      say "The run was stopped; the TPU stays, and costs. The same command goes on."
      exit "$INTERRUPTED"
      ;;
  esac
  logs || true
  printf 'Error: %s\n' "The run ended with status $1, as the log above says; the TPU stays, and costs." >&2
  exit "$1"
}

# Looks at the run and starts it where it has to be started, or ends train; status 1 where the TPU
# cannot be reached.
look() {
  local lines whole
  lines=$(run_status) || return
  whole=$(outcome "$lines")
  if [[ $whole == running ]]; then
    started=yes failed=''
  # How a run ended before this command says nothing of this one.
  elif [[ $started == no || $whole == none || $whole == "$INTERRUPTED" ]]; then
    say "Starting the run."
    start_run || return
    started=yes failed=''
  # When a TPU is preempted, some workers fail for want of others before its state says why.
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
    # A TPU that is going away does not answer, and its state will say so: that is no failure yet.
    ((misses < 10)) || fail "$name cannot be reached or set up: see the messages above."
    sleep "$poll"
  done
}

# In the order in which train comes to them when all goes well.
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
