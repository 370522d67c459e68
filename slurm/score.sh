#!/bin/bash
# Scores alone: sbatch slurm/score.sh SCORES.h5 configs/X.yaml [key=value ...]
#SBATCH --job-name=d2ft-score
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2      # as many ranks as the training has
#SBATCH --gpus-per-node=2
#SBATCH --cpus-per-task=4
#SBATCH --time=00:30:00
#SBATCH --output=logs/%x-%j.out
##SBATCH --partition=gpu
##SBATCH --account=project
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
source slurm/site.sh
srun --kill-on-bad-exit=1 --label python -m d2ft_hpc score "${@:?usage: sbatch slurm/score.sh SCORES.h5 configs/X.yaml}"
