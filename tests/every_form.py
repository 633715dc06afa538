# SPDX-License-Identifier: Apache-2.0
"""Forms of slow tests that run where somebody asks for them."""

from __future__ import annotations

import os

import pytest

EVERY_FORM = "ROCO_EVERY_FORM"
"""Environment variable that asks for more than the first form of some slow tests."""

only_with_every_form = pytest.mark.skipif(
    EVERY_FORM not in os.environ, reason=f"only with {EVERY_FORM} in the environment"
)
