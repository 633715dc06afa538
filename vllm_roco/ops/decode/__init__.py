# SPDX-License-Identifier: Apache-2.0
"""Decode attention: two kernels, how they are laid out, what they share."""
