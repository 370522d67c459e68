#!/bin/bash
# Checks what a run needs, before it waits for hours; give it the shape of the run:
#   sbatch [--nodes=N --ntasks-per-node=M] slurm/doctor.sh [--json] configs/X.yaml [key=value ...]
#SBATCH --job-name=d2ft-doctor
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2      # one a GPU
#SBATCH --gpus-per-node=2
#SBATCH --cpus-per-task=4
#SBATCH --time=00:10:00
#SBATCH --output=logs/%x-%j.out
##SBATCH --partition=gpu
##SBATCH --account=project
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
source slurm/site.sh
srun python -m d2ft_hpc doctor "${@:?usage: sbatch slurm/doctor.sh configs/X.yaml [key=value ...]}" train.resume=auto  # as train.sh
