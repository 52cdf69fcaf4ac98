#!/bin/bash
# Each run of a sweep as one task of a SLURM job array. Say how many runs there are, and what to do with each:
#
#   sbatch --array=0-9 slurm.sh train mine.yaml
#   sbatch --array=0-9 slurm.sh llc mine.yaml --preset calibrated --checkpoints 5
#
# `icl train mine.yaml --dry-run` says how many. Every node needs the same LOCAL_ROOT on a shared file system, or the same
# AWS_BUCKET_NAME. A task that is preempted, or that is about to reach its time limit, saves its last step and goes back
# into the queue. On another node it goes on from there, and ends with the same bytes.
#
#SBATCH --job-name=icl
#SBATCH --cpus-per-task=2
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=USR1@120
#SBATCH --open-mode=append
#SBATCH --output=%x-%A-%a.log

# SLURM signals the step, which saves. This script stays to read how it ended. (Ignored signals would be ignored by the
# step, too; `:` does nothing.)
trap : USR1 TERM

# A node that failed without notice holds its run for another minute.
[ "${SLURM_RESTART_COUNT:-0}" -eq 0 ] || sleep 60

srun icl "$@" --index "$SLURM_ARRAY_TASK_ID"
status=$?
case $status in
    75) scontrol requeue "$SLURM_JOB_ID" ;;            # stopped by a signal; all is saved
    138 | 143) scontrol requeue "$SLURM_JOB_ID" ;;     # the same signals, before there was anything to save
esac
exit $status
