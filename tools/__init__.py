# SPDX-License-Identifier: Apache-2.0
"""What demo, tests and benchmarks share; not part of the installed package."""
