#!/bin/bash
# A sweep, one run a point; edit the points. With the table and picture of all runs after it:
#   sweep=$(sbatch --parsable slurm/sweep.sh configs/X.yaml [key=value ...])
#   sbatch --dependency=afterok:$sweep slurm/analyse.sh runs/sweep-$sweep
#SBATCH --job-name=d2ft-sweep
#SBATCH --array=0-2%2            # a task a point; at most two at a time
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --time=04:00:00
#SBATCH --signal=USR2@120        # this many seconds before the time is up: save, requeue, go on
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/%x-%A_%a.out
##SBATCH --partition=gpu
##SBATCH --account=project
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
source slurm/site.sh
points=(
  "plan.planner=dense"
  "plan.compute_budget=0.8"
  "plan.compute_budget=0.6"
)
config=${1:?usage: sbatch slurm/sweep.sh configs/X.yaml [key=value ...]}
shift
point=${points[SLURM_ARRAY_TASK_ID]}
train "$config" "$point" run.folder="runs/sweep-$SLURM_ARRAY_JOB_ID" run.name="${point//=/-}" "$@"
