#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Lints, types, spelling, import arrows and packaging: what CI runs beside the tests.
#
#   tools/check.sh              all of them
#   tools/check.sh lint types   some of them

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup_env.sh

lint() { ruff check .; }
format() { ruff format --check .; }
types() { mypy; }
spelling() { typos; }
imports() { lint-imports --no-logo; }

package() {
  local dist
  dist="$(mktemp -d)"
  "$PYTHON" -m build --no-isolation --outdir "$dist" . >"$dist/log" 2>&1 ||
    { cat "$dist/log"; return 1; }
  "$PYTHON" -m twine check --strict "$dist"/*.whl "$dist"/*.tar.gz
  rm -r "$dist"
}

setup_env test dev

failed=()
for check in "${@:-lint format types spelling imports package}"; do
  for name in $check; do
    printf '== %s\n' "$name"
    "$name" || failed+=("$name")
  done
done
if ((${#failed[@]})); then
  printf 'checks failed: %s\n' "${failed[*]}"
  exit 1
fi
