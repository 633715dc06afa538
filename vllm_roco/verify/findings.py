# SPDX-License-Identifier: Apache-2.0
"""How a check ends that does not pass."""

from __future__ import annotations


class Skipped(Exception):
    """A check does not apply to this machine; the message says why."""


class Failed(Exception):
    """A check found something; the message says what."""
