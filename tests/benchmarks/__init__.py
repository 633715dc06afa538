# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' own workings; what they measure needs a GPU."""
