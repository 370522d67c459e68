#!/bin/bash
# Many nodes: sbatch [--nodes=N] slurm/train-multinode.sh configs/X.yaml [key=value ...]
#SBATCH --job-name=d2ft-multinode
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2      # one a GPU
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
train "${@:?usage: sbatch slurm/train-multinode.sh configs/X.yaml [key=value ...]}"
