# SPDX-License-Identifier: Apache-2.0
"""What the budget buys in serving, measured with vLLM's own benchmarks."""
