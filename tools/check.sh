#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# What CI checks beside the tests: lint, format, types, spelling, import arrows, forms that
# a forge reads, the documents as a site, the package.
#
#   tools/check.sh              all of them
#   tools/check.sh lint types   some of them

set -euo pipefail
shopt -s extglob
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup_env.sh

documents() {
  local site status=0
  site="$(mktemp -d)"
  # not --quiet, with which --strict lets every warning pass
  NO_MKDOCS_2_WARNING=1 mkdocs build --strict --site-dir "$site" || status=$?
  rm -r "$site"
  return "$status"
}

package() {
  local dist status=0
  dist="$(mktemp -d)"
  # the log tells every file that is packed: of use only if it fails
  "$PYTHON" -m build --no-isolation --outdir "$dist" >"$dist.log" 2>&1 || status=$?
  if ((status)); then
    cat "$dist.log"
  else
    {
      "$PYTHON" -m twine --no-color check --strict "$dist"/* &&
        check-wheel-contents "$dist"/*.whl &&
        "$PYTHON" -m tools.check_wheel "$dist"
    } || status=$?
  fi
  rm -r "$dist" "$dist.log"
  return "$status"
}

forms() {
  local templates=.github/ISSUE_TEMPLATE
  hadolint Dockerfile &&
    actionlint &&
    _schema github-workflows .github/workflows/*.yml &&
    _schema github-issue-config "$templates/config.yml" &&
    _schema github-issue-forms "$templates"/!(config).yml &&
    _schema citation-file-format CITATION.cff
}

# _schema NAME FILE...: one of the schemas that check-jsonschema brings.
_schema() {
  check-jsonschema --builtin-schema "vendor.$1" "${@:2}"
}

run_check() {
  case $1 in
    lint) ruff check && shellcheck -x .ci/run ./*.sh tools/*.sh ;;
    format) ruff format --check ;;
    # against the installed vLLM, then against every other tested release
    types) mypy && "$PYTHON" -m tools.check_vllm ;;
    spelling) typos ;;
    imports) lint-imports --no-logo ;;
    forms) forms ;;
    documents) documents ;;
    package) package ;;
    *)
      echo "unknown check '$1': use lint, format, types, spelling, imports, forms,"
      echo "documents or package"
      return 2
      ;;
  esac
}

setup_env test dev docs

checks=("$@")
((${#checks[@]})) || checks=(lint format types spelling imports forms documents package)
failed=()
for check in "${checks[@]}"; do
  printf '== %s\n' "$check"
  run_check "$check" || failed+=("$check")
done
if ((${#failed[@]})); then
  printf 'failed: %s\n' "${failed[*]}"
  exit 1
fi
