# SPDX-License-Identifier: Apache-2.0
"""What the tests of the patches for vLLM share."""
