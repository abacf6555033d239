#!/usr/bin/env bash
# From a fresh checkout to a slimmed model: makes .venv, installs, runs `jaxslim demo`. Arguments go to the command.
# scripts/env.sh lists the variables that change Python, environment and pip.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/env.sh
setup audio
exec "${PY%/*}/jaxslim" demo "$@"
