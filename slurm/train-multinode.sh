#!/bin/bash
# Many nodes: sbatch [--nodes=N] slurm/train-multinode.sh configs/X.yaml [key=value ...]
# With --nodes=3-4 it goes on with three if one is lost and no other is free. The ranks then share out the same batches,
# so their number must divide data.slots x the ranks at the beginning.
#SBATCH --job-name=d2ft-multinode
#SBATCH --nodes=2
#SBATCH --gpus-per-node=2
#SBATCH --cpus-per-task=4
#SBATCH --exclusive
#SBATCH --time=04:00:00
#SBATCH --signal=USR2@120        # this many seconds before the time is up: save, requeue, go on
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/%x-%j.out
##SBATCH --partition=gpu
##SBATCH --account=project
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
source slurm/site.sh
# Ranks of a node, one a GPU. Not among sbatch's lines: a job that has lost a node would wait for room for all its ranks.
export SLURM_NTASKS_PER_NODE=${SLURM_NTASKS_PER_NODE:-2}
train "${@:?usage: sbatch slurm/train-multinode.sh configs/X.yaml [key=value ...]}"
