#!/bin/bash
# Compares runs in a table, a page and a picture: sbatch slurm/analyse.sh FOLDER, which holds the run folders
#SBATCH --job-name=d2ft-analyse
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=2
#SBATCH --time=00:15:00
#SBATCH --output=logs/%x-%j.out
##SBATCH --partition=cpu
##SBATCH --account=project
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
source slurm/site.sh
folder=${1:?usage: sbatch slurm/analyse.sh FOLDER}
python -m d2ft_hpc report "$folder"/*/ --html "$folder/report.html" --png "$folder/report.png"
