#!/usr/bin/env bash
# Makes .venv, installs, then ruff and the tests. Arguments go to pytest: scripts/test.sh tests/test_spec.py -n 0
# scripts/env.sh lists the variables that change Python, environment and pip.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/env.sh
setup test,dev
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} TOKENIZERS_PARALLELISM=false
"$PY" -m ruff check .
exec "$PY" -m pytest -n "${JAXSLIM_TEST_WORKERS:-2}" --dist loadfile "$@"
