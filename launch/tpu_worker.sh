#!/usr/bin/env bash
# launch/tpu_worker.sh COMMAND
#
# The part of launch/tpu_pod.sh that runs on each worker of a pod, in ~/semiseg/project.
#
#   setup              creates ~/semiseg/venv with Python 3.11 to 3.13 and requirements-tpu.txt
#   data gs://FOLDER   copies the new files of the folder to ~/semiseg/data/FOLDER
#   run ARGUMENTS      starts semiseg_jax.main, detached, its output appended to ~/semiseg/run.log;
#                      no effect if a run is already running
#   status             prints one line: semiseg HOST, and running, stopped, ended STATUS or none
#   stop               makes the run save and exit
set -euo pipefail

UV=uv==0.13.9

home=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
script=$home/project/launch/tpu_worker.sh
cd "$home"

# uv uses a Python of the image if it is new enough (images of Ubuntu 22.04 have 3.10), and downloads
# one otherwise. It needs neither root nor apt, which is locked by the system's own updates for the
# first minutes of a new machine; pip installs the pinned version of uv.
setup() {
  local wanted
  wanted=$(cat "$script" project/requirements.txt project/requirements-tpu.txt | sha256sum)
  if [[ -e venv/made_from && $(<venv/made_from) == "$wanted" ]]; then
    return
  fi
  rm -rf uv venv
  python3 -m pip install --quiet --target=uv "$UV"
  uv/bin/uv venv --quiet --python '>=3.11,<3.14' venv
  uv/bin/uv pip install --quiet --python venv/bin/python -r project/requirements-tpu.txt
  printf '%s\n' "$wanted" >venv/made_from
}

copy_data() {
  local source=${1%/}
  local target=data/${source##*/}
  mkdir -p "$target"
  gcloud storage rsync --recursive "$source" "$target"
}

# A run is running as long as one of its processes holds the lock: this includes a process whose
# parent was killed, and excludes a run from before a restart of the machine.
running() {
  ! flock --nonblock run.lock true
}

start() {
  exec 9>run.lock
  # A status check holds the lock for an instant.
  if ! flock --wait 1 9; then
    echo "$(hostname): a run is under way already."
    return
  fi
  rm -f run.status run.stopped run.pid
  setsid nohup bash "$script" supervise "$@" >>run.log 2>&1 </dev/null &
}

# Runs in the background and holds the lock: waits for the end of the run, and writes its status.
supervise() {
  local status=0
  cd project
  "$home/venv/bin/python" -m semiseg_jax.main "$@" &
  echo $! >"$home/run.pid"
  wait $! || status=$?
  echo "$status" >"$home/run.status"
}

status() {
  local word=none
  if running; then
    word=running
  elif [[ -e run.stopped ]]; then
    word=stopped
  elif [[ -s run.status ]]; then
    word="ended $(<run.status)"
  fi
  echo "semiseg $(hostname) $word"
}

stop() {
  if ! running; then
    echo "$(hostname): nothing is running."
    return
  fi
  # The run may just be starting and have no run.pid yet.
  while running && [[ ! -s run.pid ]]; do sleep 0.1; done
  touch run.stopped
  kill -s TERM "$(<run.pid)"
}

case ${1-} in
  setup | status | stop | supervise) "$@" ;;
  data) copy_data "$2" ;;
  run) shift && start "$@" ;;
  *) sed -n '2,/^[^#]/{s/^# \{0,1\}//p;}' "$script" >&2 && exit 2 ;;
esac
