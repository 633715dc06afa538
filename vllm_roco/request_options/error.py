# SPDX-License-Identifier: Apache-2.0
"""What a request is told that asks for what it cannot have."""

from __future__ import annotations

from vllm_roco.config import MAX_INTEGER, NAMESPACE, spell
from vllm_roco.request_options.names import OPTIONS, PREFIX


class RequestOptionError(ValueError):
    """A request asks for what it cannot have; the others are not concerned.

    Attributes:
        parameter: The key of `extra_args` that it is about, in the form of one key for
            each option.
        value: What was asked for; as text what cannot be printed, or only at length.
    """

    def __init__(self, option: str, value: object, message: str) -> None:
        super().__init__(f"roco: {message}")
        self.parameter = PREFIX + option if option in OPTIONS else NAMESPACE
        is_short = isinstance(value, int | float) and abs(value) <= MAX_INTEGER
        self.value = value if is_short else spell(value)


def not_allowed(name: str, value: object, allowed: str) -> RequestOptionError:
    """Return the error about a value that an option cannot have, and what it can."""
    return RequestOptionError(
        name,
        value,
        f"{name} = {spell(value)} is not allowed in a request. Use {allowed}.",
    )
