#!/usr/bin/env bash
# launch/slurm.sh --nodes=N --gpus-per-node=G --time=LIMIT [options] -- ARGUMENTS OF semiseg_jax.main
#
# Submits a run to a Slurm cluster: one process per GPU, on N nodes of G GPUs. Before the time limit,
# and when the cluster preempts the job, the run saves and the job is requeued under the same number,
# until the run is complete.
#
#   --cpus-per-task=C   CPU cores of each process; default 8
#   --grace=S           seconds before the time limit at which the run starts to save; default 300
#   --name=NAME         name of the job; default semiseg
#   --python=P          the interpreter on the nodes; default: .venv/bin/python of this project
#   --sbatch=OPTION     a further option of sbatch, such as --sbatch=--partition=gpu; may be repeated
#   --dry-run           prints the command and submits nothing
#   --help              prints this text
#
# The project's folder must be on a file system that all nodes share; paths are relative to it, and
# the log is slurm-NAME-NUMBER.out in it.
#
#   launch/slurm.sh --nodes=2 --gpus-per-node=4 --time=8:00:00 --sbatch=--partition=gpu \
#     -- --config=configs/cityscapes.py:1_8 --workdir=/shared/runs/cityscapes_1_8
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

nodes='' gpus='' limit='' cpus=8 grace=300 name=semiseg python=$PROJECT/.venv/bin/python
further=() arguments=()

read_command() {
  while (($#)); do
    case $1 in
      --nodes=*) nodes=${1#*=} ;;
      --gpus-per-node=*) gpus=${1#*=} ;;
      --time=*) limit=${1#*=} ;;
      --cpus-per-task=*) cpus=${1#*=} ;;
      --grace=*) grace=${1#*=} ;;
      --name=*) name=${1#*=} ;;
      --python=*) python=${1#*=} ;;
      --sbatch=*) further+=("${1#*=}") ;;
      --dry-run) DRY_RUN=yes ;;
      --help | -h) usage && exit 0 ;;
      --) shift && arguments=("$@") && break ;;
      *) misused "$1 is not an option here: what is for semiseg_jax.main comes after --." ;;
    esac
    shift
  done
  need_count --nodes "$nodes"
  need_count --gpus-per-node "$gpus"
  need_count --cpus-per-task "$cpus"
  need_count --grace "$grace"
  [[ -n $limit ]] || misused "Give the time limit, such as --time=8:00:00."
  ((${#arguments[@]})) || misused "Say what to run, such as -- --config=configs/cityscapes.py:1_8."
}

read_command "$@"
# --gpus-per-node instead of --gpus-per-task: JAX assigns the i-th visible GPU to local process i, so
# each process must see all GPUs of its node.
# --signal without B: signals the processes, which save, and not the batch script.
act sbatch "--job-name=$name" "--nodes=$nodes" "--ntasks-per-node=$gpus" "--gpus-per-node=$gpus" \
  "--cpus-per-task=$cpus" "--time=$limit" "--signal=TERM@$grace" --requeue --open-mode=append \
  "--chdir=$PROJECT" --output=slurm-%x-%j.out ${further[@]+"${further[@]}"} \
  "$PROJECT/launch/slurm_job.sh" "$python" "${arguments[@]}"
