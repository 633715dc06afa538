# SPDX-License-Identifier: Apache-2.0
"""Attention over a bounded KV cache in PyTorch, for CPU builds of vLLM."""
