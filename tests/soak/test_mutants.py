# SPDX-License-Identifier: Apache-2.0
"""Mutants can be made of the package as it is; `tests.soak.mutants` makes them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.soak.mutants import MUTANTS, ROOT, Mutant, apply


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_one_change_of_code_that_compiles(
    mutant: Mutant, tmp_path: Path
) -> None:
    path = tmp_path / "vllm_roco" / mutant.file
    path.parent.mkdir(parents=True)
    shutil.copy(ROOT / "vllm_roco" / mutant.file, path)
    apply(mutant, tmp_path)
    compile(path.read_text(), str(path), "exec")
    for test in mutant.tests:
        assert (ROOT / test).exists()
