# SPDX-License-Identifier: Apache-2.0
"""What a request is told that asks for what it cannot have."""

from __future__ import annotations

from vllm_roco.config import NAMESPACE
from vllm_roco.request_options.names import OPTIONS, PREFIX

MAX_INTEGER = 2**31 - 1
"""The largest number of a row."""

_LONGEST_TEXT = 100


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


def spell(value: object) -> str:
    """Return a value as a message can hold it, whatever a client has sent."""
    try:
        text = repr(value)
    # a number of too many digits; lists in lists in lists
    except (ValueError, RecursionError):
        text = f"<{type(value).__name__}, too long to print>"
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}..."
