# SPDX-License-Identifier: Apache-2.0
"""A few shapes of every kernel; `python -m tests.soak.kernels` is a long run."""

from __future__ import annotations

import sys

import pytest

from tests.soak import kernels


@pytest.mark.parametrize(
    "arguments", [["--smallest"], ["--seconds", "10"]], ids=["smallest", "drawn"]
)
def test_kernels_agree_with_float64(
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["kernels", *arguments])
    status = kernels.main()
    said = capsys.readouterr().out
    assert status == 0, said
    assert said.endswith(", 0 faults\n")
    print(said)
