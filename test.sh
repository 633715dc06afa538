#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Installs what the tests need into .venv (see tools/setup_env.sh) and runs them.
#
#   ./test.sh                        every test that this machine can run
#   ./test.sh -m "not engine"        arguments go to pytest
#   ./test.sh -n 0                   in one process, so that -s shows what a test prints
#   ./test.sh --randomly-seed=last   in the order of the run before

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source tools/setup_env.sh

setup_env test
# "logical" and not 2, for which pytest-xdist refuses --pdb
exec "$PYTHON" -m pytest -n logical --maxprocesses 2 --dist loadgroup "$@"
