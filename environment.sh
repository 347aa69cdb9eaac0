# shellcheck shell=bash
# Sourced by qwen3_sft.sh and tests/run.sh: finds or makes the Python environment and leaves its
# interpreter in $QWEN3_SFT_PYTHON.
#
#   use_environment [EXTRA]   e.g. `use_environment dev`
#
# An environment that is active is used as it is when the package is installed in it; it is changed
# only after a "y" at the prompt, or when QWEN3_SFT_INSTALL=1 says so beforehand. Without one, or with
# nothing but conda's base, .venv is made beside this file; a .venv that is a link is somebody
# else's, and is treated like an active one.

# With CDPATH set, `cd folder` may go elsewhere and prints where.
QWEN3_SFT_HOME="$(unset CDPATH && cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"

_say() { printf '%s\n' "[qwen3-sft] $*" >&2; }

_installed() { # PYTHON [EXTRA]: is this clone's package there, and what the extra needs?
  local needed=""
  [ "${2:-}" = dev ] && needed="pytest xdist pyrefly deepspeed tensorboardX"
  # -I: the current folder must not count as installed.
  "$1" -I - "$QWEN3_SFT_HOME" "$needed" 2>/dev/null <<'PYTHON'
import importlib.util, pathlib, sys
home, needed = pathlib.Path(sys.argv[1]).resolve(), sys.argv[2].split()
spec = importlib.util.find_spec("qwen3_sft")
is_ours = spec is not None and home in pathlib.Path(spec.origin).resolve().parents
sys.exit(not is_ours or any(importlib.util.find_spec(name) is None for name in needed))
PYTHON
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
    read -r -p "[qwen3-sft] $where lacks the package of $QWEN3_SFT_HOME. Install it there? [y/N] " answer
  fi
  if [ "$answer" != y ] && [ "$answer" != Y ]; then
    _say "$where is active and lacks the package${1:+ with its extra [$1]} of this folder,"
    _say "$QWEN3_SFT_HOME. Nothing was changed. Either"
    _say "  - deactivate it, or remove it if it is a link, and an own environment is made in"
    _say "    $QWEN3_SFT_HOME/.venv, or"
    _say "  - run again with QWEN3_SFT_INSTALL=1 to install into it."
    return 2
  fi
  _install "$QWEN3_SFT_PYTHON" "$1"
}

_unlock() { if command -v flock >/dev/null 2>&1; then flock -u 9; fi; }

_use_own() { # EXTRA
  local venv="$QWEN3_SFT_HOME/.venv" python ready wanted
  if [ -L "$venv" ]; then
    VIRTUAL_ENV="$venv" _use_active "$1"
    return
  fi
  ready="$venv/.ready${1:+-$1}"
  wanted="$(cat "$QWEN3_SFT_HOME/constraints.txt" "$QWEN3_SFT_HOME/setup.py" | cksum)"
  QWEN3_SFT_PYTHON="$venv/bin/python"
  if command -v flock >/dev/null 2>&1; then # a second start waits for the first to finish
    exec 9>"$venv.lock"
    flock 9
  fi
  if [ -x "$QWEN3_SFT_PYTHON" ] && [ "$(cat "$ready" 2>/dev/null)" = "$wanted" ]; then
    _unlock
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
  _unlock
}

_is_active() { # EXTRA; conda's base is always active and hardly ever meant
  [ -n "${VIRTUAL_ENV:-}" ] && return
  [ -n "${CONDA_PREFIX:-}" ] || return
  [ "${CONDA_DEFAULT_ENV:-}" != base ] || _installed "$CONDA_PREFIX/bin/python" "$1"
}

use_environment() {
  local extra="${1:-}"
  if _is_active "$extra"; then
    _use_active "$extra"
  else
    _use_own "$extra"
  fi
  PATH="$(dirname "$QWEN3_SFT_PYTHON"):$PATH"
  export PATH
}
