#!/bin/bash
# Planning alone, on a CPU node: sbatch slurm/plan.sh SCORES.h5 --save PLAN.h5 [options of d2ft-hpc plan]
#SBATCH --job-name=d2ft-plan
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --time=00:15:00
#SBATCH --output=logs/%x-%j.out
##SBATCH --partition=cpu
##SBATCH --account=project
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
source slurm/site.sh
python -m d2ft_hpc plan "${@:?usage: sbatch slurm/plan.sh SCORES.h5 --save PLAN.h5}"
