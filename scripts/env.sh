# Sourced by demo.sh and test.sh: makes the virtual environment, installs jaxslim into it, sets $PY.
#
#   PYTHON=python3.12          the Python to use (default: the first of 3.11, 3.12, then any newer one)
#   JAXSLIM_VENV=DIR           the environment (default: .venv); an existing one is used as it is, plus what is missing
#   JAXSLIM_PIP_ARGS="..."     more arguments for pip install, for example an index of CPU-only torch builds
#   JAXSLIM_NO_INSTALL=1       install nothing, take the environment as it is

fail() { echo "error: $*" >&2; exit 2; }

find_python() {
  local p
  for p in ${PYTHON:-python3.11 python3.12 python3 python3.13 python3.14 python}; do
    "$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$p"; return; }
  done
  fail "no Python 3.11 or newer found${PYTHON:+ at PYTHON=$PYTHON}. Install one, or set PYTHON=/path/to/python3.11"
}

# setup EXTRAS: quick when pyproject.toml, the constraints and the place of the checkout are those of the last install
setup() {
  local venv=${JAXSLIM_VENV:-$PWD/.venv} extras=$1 python tag constraints stamp
  PY=$venv/bin/python
  if [ ! -x "$venv/bin/pip" ]; then
    python=$(find_python) || exit 2
    echo "Making a virtual environment in $venv"
    "$python" -m venv "$venv" || fail "could not make $venv with $python; on Debian and Ubuntu: apt install python3-venv"
  fi
  export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$venv/.cache/jax}
  [ -n "${JAXSLIM_NO_INSTALL:-}" ] && return
  tag=$("$PY" -c 'import sys; print("py%d%d" % sys.version_info[:2])')
  constraints=scripts/constraints/$tag.txt
  [ -f "$constraints" ] || { echo "note: no tested versions for $tag, taking the newest" >&2; constraints=/dev/null; }
  stamp="$PWD ${JAXSLIM_PIP_ARGS:-} $(cat pyproject.toml "$constraints" | cksum)"
  [ "$(cat "$venv/.jaxslim-$extras" 2>/dev/null)" = "$stamp" ] && return
  echo "Installing jaxslim[$extras] into $venv (some minutes the first time)"
  # shellcheck disable=SC2086
  "$PY" -m pip install --disable-pip-version-check --progress-bar off -c "$constraints" ${JAXSLIM_PIP_ARGS:-} \
    -e ".[$extras]" || fail "pip could not install jaxslim[$extras]; its message is above"
  echo "$stamp" > "$venv/.jaxslim-$extras"
}
