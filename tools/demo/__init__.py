# SPDX-License-Identifier: Apache-2.0
"""The demonstration behind `demo.sh`, one step a module: `python -m tools.demo`."""
