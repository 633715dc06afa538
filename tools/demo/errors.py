# SPDX-License-Identifier: Apache-2.0
"""What the demo tells its user instead of a traceback."""

from __future__ import annotations


class DemoError(Exception):
    """Something the user has to know or to mend; its text is all that is shown."""
