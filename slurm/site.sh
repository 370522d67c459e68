# shellcheck shell=bash
# Your site, once for all scripts of this folder, which source it. Edit the part between the lines.

# ---- modules, conda, venv ------------------------------------------------------------------------------------------
# module purge && module load python cuda openmpi
# source "$HOME/miniconda3/bin/activate" d2ft
# The venv that was active where the job was submitted, else .venv.
# shellcheck disable=SC1091 # made by the user
if [[ -z ${VIRTUAL_ENV-} && -f .venv/bin/activate ]]; then source .venv/bin/activate; fi
# How srun starts MPI ranks: pmi2 for MPICH and Intel MPI (also the `mpich` wheel), pmix for Open MPI, cray_shasta on
# Cray. `srun --mpi=list` shows what there is; `sbatch slurm/doctor.sh CONFIG` finds out whether it fits.
export SLURM_MPI_TYPE=${SLURM_MPI_TYPE:-pmi2}
# MPICH over UCX, as in the `mpich` wheel, starts on several nodes with messages longer than the 1024 bytes that Slurm's
# pmi2 reads at once ("value not properly terminated in client request"); those of OFI are short. MPI carries control
# messages alone, so this costs no bandwidth.
export MPIR_CVAR_CH4_NETMOD=${MPIR_CVAR_CH4_NETMOD:-ofi}
# Ranks that are killed leave MPICH's shared memory behind, under a name that a requeued job gets again: on that node it
# would wait in it for ever. So the ranks of a node talk over the network, too.
export MPIR_CVAR_NOLOCAL=${MPIR_CVAR_NOLOCAL:-1}
# Compute nodes rarely reach the internet: models come from the cache that a login node filled.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0   # if the nodes have several networks
# export FI_PROVIDER=cxi                                 # Slingshot
# --------------------------------------------------------------------------------------------------------------------

# srun does not take --cpus-per-task over from sbatch.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}

# train CONFIG [KEY=VALUE ...]: trains on all tasks of the job and, where the run is not done, puts the job back into
# the queue. Ranks come from srun; the run goes on from its newest checkpoint, and ends at once if it is finished.
train() {
  local config=$1 status=0
  shift
  mkdir -p logs
  export D2FT_FAILURE_FILE=$PWD/logs/failure-$SLURM_JOB_ID
  rm -f "$D2FT_FAILURE_FILE"
  trap : TERM # the ranks get it too, save, and end; this shell has to outlive them
  srun --kill-on-bad-exit=1 --label "${CONTAINER[@]}" python -m d2ft_hpc train "$config" train.resume=auto "$@" ||
    status=$?
  requeue_if_unfinished "$status"
}

# 75: stopped by a signal, hung, or a process was lost. 137, 140, 143: a rank was killed, or was signalled before it could
# listen (9, 12, 15 where MPICH's mpirun started it); so are the others when one fails by itself, which then leaves a
# message: that job has ended. So has one with 76, whose loss is not finite any more: it would end so again.
requeue_if_unfinished() {
  local most_restarts=20
  if [[ -s $D2FT_FAILURE_FILE ]]; then
    echo "failed, not to be repeated: $(<"$D2FT_FAILURE_FILE")"
    rm "$D2FT_FAILURE_FILE"
    exit 1
  fi
  case $1 in
  75 | 137 | 140 | 143 | 9 | 12 | 15)
    # A job that the user cancelled stays so.
    if [[ $(squeue -h -j "$SLURM_JOB_ID" -o %T) == RUNNING ]] && ((${SLURM_RESTART_COUNT:-0} < most_restarts)); then
      echo "unfinished (status $1): back into the queue"
      scontrol requeue "$SLURM_JOB_ID"
      sleep 60 # until Slurm ends this script
    fi
    ;;
  esac
  exit "$1"
}
CONTAINER=() # what runs python inside a container; see container.sh
