# SPDX-License-Identifier: Apache-2.0
"""The demonstration behind `demo.sh`, one step a module: `python -m tools.demo`."""

from __future__ import annotations


class DemoError(Exception):
    """Something the user has to know or to mend; its text is all that is shown."""
