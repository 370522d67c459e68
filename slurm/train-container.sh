#!/bin/bash
# In a container: sbatch slurm/train-container.sh configs/X.yaml [key=value ...]
# The image has this package and its dependencies. Its MPI must be one that srun's --mpi can start: MPICH with pmi2.
#SBATCH --job-name=d2ft-container
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2      # one a GPU
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
# Apptainer or Singularity; with Pyxis instead: CONTAINER=() and srun's --container-image through SRUN_CONTAINER_IMAGE.
CONTAINER=(apptainer exec --nv --bind "$PWD" --pwd "$PWD" "${D2FT_IMAGE:-d2ft-hpc.sif}")
train "${@:?usage: sbatch slurm/train-container.sh configs/X.yaml [key=value ...]}"
