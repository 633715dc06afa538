#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Installs what the tests need into .venv (see tools/setup_env.sh) and runs them.
#
#   ./test.sh                   every test that this machine can run
#   ./test.sh -m "not engine"   arguments go to pytest

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source tools/setup_env.sh

setup_env test
exec "$PYTHON" -m pytest "$@"
