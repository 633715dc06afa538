# SPDX-License-Identifier: Apache-2.0
"""Where K, V and the statistics lie, and how the blocks are accounted for."""
