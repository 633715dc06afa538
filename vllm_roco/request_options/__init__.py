# SPDX-License-Identifier: Apache-2.0
"""The options that a request brings with it, and the row that comes of them.

Pure Python, and a function of the request alone: front ends check with it, the
scheduler plans with it.
"""
