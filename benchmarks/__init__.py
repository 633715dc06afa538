# SPDX-License-Identifier: Apache-2.0
"""What the plugin costs and buys, in quality, serving and kernels."""
