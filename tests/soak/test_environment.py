# SPDX-License-Identifier: Apache-2.0
"""Long runs have an environment of their own, tests keep theirs."""

from __future__ import annotations

import os

import pytest

from tests.fresh_python import run_fresh

NAME = "VLLM_CPU_OMP_THREADS_BIND"
CODE = f"import os, pytest, tests.soak.environment; print(os.environ.get({NAME!r}))"


@pytest.mark.parametrize("in_a_test", [True, False])
def test_it_is_set_for_long_runs(in_a_test: bool) -> None:
    """A run that had imported pytest by then, to patch with, went without it.

    So `killed_core` bound its threads, and could not start two ranks on one node.
    """
    environment = dict(os.environ)
    environment.pop(NAME, None)
    if not in_a_test:
        del environment["PYTEST_VERSION"]
    done = run_fresh(CODE, environment=environment)
    assert done.stdout.split() == ["None" if in_a_test else "nobind"], done.stderr
