#!/usr/bin/env bash
# Runs one jaxslim command on every worker of a Cloud TPU VM slice, as one run.
#
#   scripts/tpu_pod.sh NAME ZONE install
#   scripts/tpu_pod.sh NAME ZONE train configs/train_ctc.yaml output_dir=gs://BUCKET/run mesh=data=-1,fsdp=16
#
# NAME is a TPU VM made with `gcloud compute tpus tpu-vm create`. `install` copies this checkout to all workers and
# installs it. Outputs must be in gs://: the workers share no disk. Run again after a preemption, a run goes on where it
# stood (exit code 75 says that it was stopped and has saved).
#   JAXSLIM_CACHE=gs://BUCKET/xla   compilation cache, shared by all workers and later runs
#   DRY=1                           print the commands, run nothing
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 3 ] || { sed -n '2,12p' "$0" | cut -c3-; exit 2; }
name=$1 zone=$2
shift 2

gcloud_() { if [ -n "${DRY:-}" ]; then printf 'gcloud'; printf ' %q' "$@"; echo; else gcloud "$@"; fi; }
everywhere() { gcloud_ compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command "$1"; }

if [ "$1" = install ]; then
  archive=$(mktemp -d)/jaxslim.tar.gz
  git archive --format tar.gz -o "$archive" HEAD
  gcloud_ compute tpus tpu-vm scp "$archive" "$name":jaxslim.tar.gz --zone "$zone" --worker=all
  everywhere "mkdir -p jaxslim && tar -xzf jaxslim.tar.gz -C jaxslim && python3 -m venv jaxslim/.venv && \
jaxslim/.venv/bin/pip install -q -e 'jaxslim[tpu,audio]' gcsfs"
  exit
fi
# one sentence of quoting for ssh; libtpu reads its flags once, at start (see `jaxslim info`)
command=$(printf ' %q' "$@")
flags=$(PYTHONPATH=. "${PYTHON:-python3}" -c 'from jaxslim.info import RECOMMENDED; print(RECOMMENDED["tpu"]["LIBTPU_INIT_ARGS"])')
everywhere "cd jaxslim && JAXSLIM_DISTRIBUTED=1 JAX_COMPILATION_CACHE_DIR=${JAXSLIM_CACHE:-\$HOME/.cache/jaxslim/xla} \
LIBTPU_INIT_ARGS='$flags' .venv/bin/jaxslim$command"
