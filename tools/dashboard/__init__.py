# SPDX-License-Identifier: Apache-2.0
"""The dashboard without Grafana: its panels, asked of Prometheus and drawn.

`python -m tools.dashboard URL -- COMMAND` has Prometheus scrape a running server while
a command gives it something to do, then draws what each panel's queries answer.
"""


class DashboardError(Exception):
    """It cannot be shown, for a reason that is told in one line."""
