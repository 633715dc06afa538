#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Installs the wheel of a folder beside vLLM, and looks whether vLLM will find it. The
# Dockerfile runs it in vLLM's image, tools/check_wheel.py in an empty environment.
#
#   tools/install_wheel.sh FOLDER      into the `python3` on PATH; moves nothing of vLLM

set -euo pipefail

wheels=("$1"/*.whl)
[[ ${#wheels[@]} == 1 && -f ${wheels[0]} ]] || {
  echo "error: there must be one wheel in $1, found: ${wheels[*]}" >&2
  exit 1
}
python="$(command -v python3)"
# vLLM's image has uv, and a Python that Debian's rules would keep as it is
if command -v uv >/dev/null; then
  uv pip install --python "$python" --break-system-packages --no-deps "${wheels[0]}"
else
  "$python" -m pip --disable-pip-version-check install --quiet --no-deps "${wheels[0]}"
fi
# -P: what lies in the current folder does not count
"$python" -P - <<'PYTHON'
from importlib.metadata import entry_points

found = {point.group: point.load() for point in entry_points(name="roco")}
wanted = {"vllm.general_plugins", "vllm.platform_plugins"}
if found.keys() != wanted:
    raise SystemExit(f"error: vLLM looks for roco in {wanted}, which is in {found}")
PYTHON
