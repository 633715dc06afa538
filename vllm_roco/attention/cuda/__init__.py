# SPDX-License-Identifier: Apache-2.0
"""Attention over a bounded KV cache by Triton kernels, for CUDA."""
