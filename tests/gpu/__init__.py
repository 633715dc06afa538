# SPDX-License-Identifier: Apache-2.0
"""Whole engines on a GPU; `docs/gpu-tests.md` tells how to run them."""
