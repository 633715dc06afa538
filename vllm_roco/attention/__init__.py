# SPDX-License-Identifier: Apache-2.0
"""The attention backend: what it accepts, and how it attends, measures and evicts."""
