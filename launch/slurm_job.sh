#!/usr/bin/env bash
# launch/slurm_job.sh PYTHON ARGUMENTS OF semiseg_jax.main
#
# What launch/slurm.sh submits: Slurm runs it on the job's first node, it starts the processes on
# all nodes, and queues the job again when they were interrupted.
set -euo pipefail

python=$1
shift

# Told to end by preemption or scancel, the processes are told too; this script stays for them.
trap : TERM

# --gpu-bind=none: each process sees all GPUs of its node, and takes the one of its local number.
# --wait: when one has ended, the others have that long to say what they know and end themselves.
# --cpus-per-task: srun does not take it over from sbatch.
status=0
srun --label --gpu-bind=none --kill-on-bad-exit=0 --wait=120 \
  "--cpus-per-task=${SLURM_CPUS_PER_TASK:?}" \
  "$python" -m semiseg_jax.main "$@" || status=$?

if ((status == 75)); then
  echo "Interrupted after all was saved: job $SLURM_JOB_ID is queued again to go on."
  # Refused for jobs with Requeue=0 (see docs/gpu_clusters.md): then the job ends here.
  scontrol requeue "$SLURM_JOB_ID" || exit "$status"
fi
exit "$status"
