# SPDX-License-Identifier: Apache-2.0
"""`python -m vllm_roco.verify`."""

from __future__ import annotations

import sys

from vllm_roco.verify import main

# the engine's processes import this module as well
if __name__ == "__main__":
    sys.exit(main())
