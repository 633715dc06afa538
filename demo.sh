#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Shows on a real model what the budget does: set-up, server, requests, table, picture.
#
#   ./demo.sh          everything by default
#   ./demo.sh --help   what can be chosen

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/tools/setup_env.sh"

# instead of changing the folder, which would change what the arguments' paths mean
export PYTHONPATH="$ROCO_ROOT${PYTHONPATH:+:$PYTHONPATH}"
# any Python can tell what is wrong with an argument, before minutes of set-up
python="$(find_python)"
case " $* " in
  *" -h "* | *" --help "*) exec "$python" -P -m tools.demo.options --help ;;
esac
extras="$("$python" -P -m tools.demo.options "$@")"

# names of extras, one a word
# shellcheck disable=SC2086
setup_env $extras
exec "$PYTHON" -P -m tools.demo "$@"
