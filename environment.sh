# shellcheck shell=bash
# Sourced by qwen3_sft.sh, qwen3_sft_multinode.sh and tests/run.sh: finds or makes the Python
# environment and leaves its interpreter in $QWEN3_SFT_PYTHON.
#
#   use_environment [EXTRA]   e.g. `use_environment dev`
#
# An environment that is active is used as it is when the package is installed in it; it is changed
# only after a "y" at the prompt, or when QWEN3_SFT_INSTALL=1 says so beforehand. Without one, .venv
# is made beside this file.

# With CDPATH set, `cd folder` may go elsewhere and prints where.
QWEN3_SFT_HOME="$(unset CDPATH && cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"

_say() { printf '%s\n' "[qwen3-sft] $*" >&2; }

_installed() { # PYTHON [EXTRA]; -I: the current folder must not count as installed
  local modules="qwen3_sft, monkey_patch"
  [ "${2:-}" = dev ] && modules="$modules, pytest, xdist"
  (cd / && "$1" -I -c "import importlib.util as u, sys; sys.exit(any(u.find_spec(m.strip()) is None for m in '$modules'.split(',')))") 2>/dev/null
}

_install() { # PYTHON EXTRA
  local target="$QWEN3_SFT_HOME${2:+[$2]}"
  "$1" -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' "$QWEN3_SFT_HOME/constraints.txt")"
  "$1" -m pip install --quiet --disable-pip-version-check -c "$QWEN3_SFT_HOME/constraints.txt" -e "$target"
}

_find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.12 python3.11 python; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  _say "no Python 3.11, 3.12 or 3.13 with the venv module found (Debian and Ubuntu: apt install python3-venv); install one or set PYTHON=/path/to/python"
  return 2
}

_use_active() { # EXTRA
  local where="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}" answer=n
  QWEN3_SFT_PYTHON="$where/bin/python"
  if [ ! -x "$QWEN3_SFT_PYTHON" ]; then
    _say "$where is said to be active (VIRTUAL_ENV or CONDA_PREFIX) but has no bin/python; unset that variable"
    return 2
  fi
  _installed "$QWEN3_SFT_PYTHON" "$1" && return
  if [ "${QWEN3_SFT_INSTALL:-0}" = 1 ]; then
    answer=y
  elif [ -t 0 ]; then
    read -r -p "[qwen3-sft] $where lacks the package. Install it there? [y/N] " answer
  fi
  if [ "$answer" != y ] && [ "$answer" != Y ]; then
    _say "$where is active and lacks the package${1:+ with its extra [$1]}. Nothing was changed. Either"
    _say "  - deactivate it, and an own environment is made in $QWEN3_SFT_HOME/.venv, or"
    _say "  - run again with QWEN3_SFT_INSTALL=1 to install into it."
    return 2
  fi
  _install "$QWEN3_SFT_PYTHON" "$1"
}

_use_own() { # EXTRA
  local venv="$QWEN3_SFT_HOME/.venv" python ready wanted
  ready="$venv/.ready${1:+-$1}"
  wanted="$(cat "$QWEN3_SFT_HOME/constraints.txt" "$QWEN3_SFT_HOME/setup.py" | cksum)"
  QWEN3_SFT_PYTHON="$venv/bin/python"
  if [ -x "$QWEN3_SFT_PYTHON" ] && [ "$(cat "$ready" 2>/dev/null)" = "$wanted" ]; then
    return
  fi
  # Without pip it was left half made: interrupted, or by a Python that lacks ensurepip.
  if ! "$QWEN3_SFT_PYTHON" -m pip --version >/dev/null 2>&1; then
    python="$(_find_python)" || return 2
    _say "making an environment in $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
  fi
  _say "installing the tested versions (constraints.txt); on a fast network this takes a minute or two"
  _install "$QWEN3_SFT_PYTHON" "$1"
  printf '%s' "$wanted" >"$ready"
}

use_environment() {
  local extra="${1:-}"
  if [ -n "${VIRTUAL_ENV:-${CONDA_PREFIX:-}}" ]; then
    _use_active "$extra"
  else
    _use_own "$extra"
  fi
  PATH="$(dirname "$QWEN3_SFT_PYTHON"):$PATH"
  export PATH
}
