#!/usr/bin/env bash
# A training on several machines, under SLURM: one torchrun a node, one process a GPU.
#
#     sbatch --nodes 2 runs/slurm.sh train.py --recipe pretrain --data_root D --vision CLIP --text ROBERTA
#
# The folder of the run and the data lie on a disk that all nodes share. Two minutes before the time
# is up SLURM sends SIGTERM, the run saves and ends, and is queued again: it goes on where it was.
#
# Environment: NPROC (processes a node, default 8), PORT (default 29500).
#SBATCH --job-name manager
#SBATCH --ntasks-per-node 1
#SBATCH --gpus-per-node 8
#SBATCH --cpus-per-task 128
#SBATCH --time 24:00:00
#SBATCH --signal B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode append
set -euo pipefail
[ $# -gt 0 ] || { echo "error: which training? for example: sbatch runs/slurm.sh train.py" >&2; exit 1; }
[ -n "${SLURM_JOB_ID:-}" ] || { echo "error: this script is for sbatch; on one machine use torchrun" >&2; exit 1; }

first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 torchrun \
  --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node "${NPROC:-8}" \
  --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID" --rdzv_endpoint "$first_node:${PORT:-29500}" \
  "$@" &
training=$!

stop() {  # srun hands the signal on to all processes; the next job goes on from their save
  kill -TERM "$training"
  wait "$training" || true
  scontrol requeue "$SLURM_JOB_ID"
}
trap stop TERM
wait "$training"
