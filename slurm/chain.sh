#!/bin/bash
# Scoring, planning and training as jobs that follow one another, each of its own size:
#   bash slurm/chain.sh configs/X.yaml [key=value ...]         on a login node, or
#   sbatch slurm/chain.sh configs/X.yaml [key=value ...]       where jobs may submit jobs
# The scores and the plan lie in runs/chain-*/; PLAN_OPTIONS are those of `d2ft-hpc plan`.
#SBATCH --job-name=d2ft-chain
#SBATCH --ntasks=1
#SBATCH --time=00:05:00
#SBATCH --output=logs/%x-%j.out
##SBATCH --partition=cpu
##SBATCH --account=project
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
: "${1:?usage: bash slurm/chain.sh configs/X.yaml [key=value ...]}"
read -ra plan_options <<<"${PLAN_OPTIONS:---planner joint --compute-budget 0.6}"
folder=${CHAIN_FOLDER:-runs/chain-${SLURM_JOB_ID:-$(date +%Y%m%d-%H%M%S)}}
mkdir -p "$folder"
score=$(sbatch --parsable slurm/score.sh "$folder/scores.h5" "$@")
plan=$(sbatch --parsable --dependency="afterok:$score" --kill-on-invalid-dep=yes \
  slurm/plan.sh "$folder/scores.h5" --save "$folder/plan.h5" "${plan_options[@]}")
train=$(sbatch --parsable --dependency="afterok:$plan" --kill-on-invalid-dep=yes \
  slurm/train.sh "$@" plan.file="$folder/plan.h5")
echo "jobs: scoring $score, planning $plan, training $train; files in $folder"
