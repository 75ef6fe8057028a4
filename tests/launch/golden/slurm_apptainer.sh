#!/bin/bash
#SBATCH --job-name=jaxmed-mae-b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=90
#SBATCH --output=/home/me/runs/MAE_b.launch/log-%j.txt
#SBATCH --open-mode=append
#SBATCH --signal=USR1@60
#SBATCH --requeue

# Written by jaxmed launch slurm. The command starts the run, or goes on with it.
export JAX_COMPILATION_CACHE_DIR=/scratch/cache
cd /home/me || exit 1
echo "$(date -Is) job $SLURM_JOB_ID starts on $SLURM_JOB_NODELIST, restart ${SLURM_RESTART_COUNT:-0}"

srun --label --kill-on-bad-exit=0 --wait=600 apptainer exec --nv --bind=/home/me,/home/me/runs,/mnt/lab/corpus,/home/me/experiments,/scratch/cache --pwd=/home/me /images/jaxmed.sif /opt/bin/python -m jaxmed train /home/me/experiments/mae.py:laptop batch_size=4096 --data /mnt/lab/corpus --out /home/me/runs/MAE_b --auto-resume
code=$?

# 75: a signal stopped it and everything is saved; 69: a process or device did not answer any more;
# 138, 143: the signal came before training began.
case $code in 75 | 69 | 138 | 143)
  if [ -e /home/me/runs/MAE_b.launch/stop ]; then
    echo "$(date -Is) stopped by jaxmed stop"
  elif [ "${SLURM_RESTART_COUNT:-0}" -ge 100 ]; then
    echo "$(date -Is) stopped after 100 restarts"
  else
    echo "$(date -Is) stopped with code $code, queued again"
    scontrol requeue "$SLURM_JOB_ID" && sleep 60  # SLURM ends this script meanwhile
  fi ;;
esac
exit $code
