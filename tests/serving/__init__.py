# SPDX-License-Identifier: Apache-2.0
"""RoCo behind vLLM's own front ends, with engines in processes of their own."""
