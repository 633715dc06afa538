# SPDX-License-Identifier: Apache-2.0
"""A vLLM attention backend that keeps a budget of KV cache tokens per sequence."""
