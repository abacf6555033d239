#!/usr/bin/env bash
# One jaxslim run over the GPUs of several hosts: one process a GPU, found by jax.distributed from SLURM's variables.
#
#   sbatch --nodes=2 --gpus-per-node=8 scripts/slurm_gpu.sh train configs/train_ctc.yaml mesh=data=-1 output_dir=/shared/run
#
# The checkout, its .venv (pip install -e '.[cuda13,audio]') and output_dir must be on a disk that all hosts see.
#SBATCH --job-name=jaxslim
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-task=1
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=jaxslim-%j.log
set -uo pipefail
[ $# -ge 1 ] || { sed -n '2,7p' "$0" | cut -c3-; exit 2; }
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
export JAXSLIM_DISTRIBUTED=1 JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/jaxslim/xla}
XLA_FLAGS="${XLA_FLAGS:-} $(.venv/bin/python -c 'from jaxslim.info import RECOMMENDED; print(RECOMMENDED["gpu"]["XLA_FLAGS"])')"
export XLA_FLAGS
srun --kill-on-bad-exit=1 .venv/bin/jaxslim "$@"
code=$?
# 75: SLURM's TERM (two minutes before the time limit) stopped the run, and it has saved; queue the rest
if [ $code -eq 75 ] && [ -n "${SLURM_JOB_ID:-}" ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $code
