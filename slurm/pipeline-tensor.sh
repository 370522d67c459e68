#!/bin/bash
# Pipeline x tensor parallelism: sbatch slurm/pipeline-tensor.sh configs/X.yaml [key=value ...]
# Tensor parallelism stays inside a node, the pipeline goes over nodes; the rest of the ranks are replicas.
#SBATCH --job-name=d2ft-pipeline-tensor
#SBATCH --nodes=2                # one a stage
#SBATCH --ntasks-per-node=2      # one a GPU: those that share each block
#SBATCH --gpus-per-node=2
#SBATCH --cpus-per-task=4
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
config=${1:?usage: sbatch slurm/pipeline-tensor.sh configs/X.yaml [key=value ...]}
shift
train "$config" engine.pipeline_stages="$SLURM_JOB_NUM_NODES" engine.tensor_parallel="$SLURM_NTASKS_PER_NODE" "$@"
