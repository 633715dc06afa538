# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the CUDA backend, one job a file.

The launchers are called inside CUDA graphs: they allocate nothing, read no length on
the host, and their grids depend on shapes alone. Scratch memory and outputs are passed
in.
"""
