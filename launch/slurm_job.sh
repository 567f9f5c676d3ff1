#!/usr/bin/env bash
# launch/slurm_job.sh PYTHON ARGUMENTS OF semiseg_jax.main
#
# The batch script that launch/slurm.sh submits. It runs on the job's first node, starts the
# processes on all nodes, and requeues the job if they were interrupted.
set -euo pipefail

python=$1
shift

# On preemption or scancel Slurm also signals the processes; this script must outlive them.
trap : TERM

# --gpu-bind=none: each process sees all GPUs of its node, and uses the one with its local number.
# --wait: after one process ends, the others have this many seconds to log errors and exit.
# --cpus-per-task: srun does not inherit it from sbatch.
status=0
srun --label --gpu-bind=none --kill-on-bad-exit=0 --wait=120 \
  "--cpus-per-task=${SLURM_CPUS_PER_TASK:?}" \
  "$python" -m semiseg_jax.main "$@" || status=$?

if ((status == 75)); then
  echo "Interrupted after all was saved: job $SLURM_JOB_ID is queued again to go on."
  # Slurm refuses it for jobs with Requeue=0 (see docs/gpu_clusters.md); then the job ends here.
  scontrol requeue "$SLURM_JOB_ID" || exit "$status"
fi
exit "$status"
