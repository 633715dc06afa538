# SPDX-License-Identifier: Apache-2.0
"""How trouble is told once serving has begun: one warning, and no error."""

from __future__ import annotations

import logging

# a name of vLLM's, whose handler it gets; vLLM itself takes seconds to import
logger = logging.getLogger(f"vllm.{__name__}")


def warn_of_end(what: str, error: Exception) -> None:
    """Say that something has been switched off.

    Args:
        what: A noun, as in "the trace".
        error: Why.
    """
    logger.warning(
        "roco: %s ends here, and the engine goes on without: %s: %s.",
        what,
        type(error).__name__,
        error,
    )
