# SPDX-License-Identifier: Apache-2.0
"""The forms in which a request brings its options.

Over HTTP the options are `vllm_xargs`, offline `SamplingParams.extra_args`: either one
key for each, `{"roco_budget": 512}`, or one for all, `{"roco": {"budget": 512}}`, whose
value may be a JSON string, for HTTP carries no nested dictionary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vllm_roco.config import NAMESPACE, spell
from vllm_roco.request_options.error import RequestOptionError
from vllm_roco.request_options.names import OPTIONS, PREFIX


def options_in(extra_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the options that a request brings, by name; nothing is checked but names.

    Args:
        extra_args: `SamplingParams.extra_args`; keys of others are left alone.

    Raises:
        RequestOptionError: An unknown key, or both forms at once.
    """
    if not extra_args:
        return {}
    flat = {
        key.removeprefix(PREFIX): value
        for key, value in extra_args.items()
        if isinstance(key, str) and key.startswith(PREFIX)
    }
    if NAMESPACE not in extra_args:
        return _known(flat)
    nested = extra_args[NAMESPACE]
    if flat:
        raise RequestOptionError(
            NAMESPACE,
            nested,
            f"the request has both {NAMESPACE} = {spell(nested)} and "
            f"{PREFIX}{next(iter(flat))}. Use one form for all options.",
        )
    if isinstance(nested, str):
        try:
            nested = json.loads(nested)
        # the second for lists in lists in lists
        except (ValueError, RecursionError) as error:
            raise _not_a_dictionary(nested) from error
    if not isinstance(nested, Mapping):
        raise _not_a_dictionary(nested)
    return _known(dict(nested))


def _not_a_dictionary(value: object) -> RequestOptionError:
    return RequestOptionError(
        NAMESPACE,
        value,
        f"{NAMESPACE} = {spell(value)} is not a dictionary of options. Use one, over "
        'HTTP as a JSON string, for example "{\\"budget\\": 512}", or one key for each '
        f"option, for example {PREFIX}budget.",
    )


def _known(options: dict[str, Any]) -> dict[str, Any]:
    for name, value in options.items():
        if name not in OPTIONS:
            raise RequestOptionError(
                NAMESPACE,
                value,
                f"unknown option {spell(name)} = {spell(value)} in a request. "
                "Allowed are "
                f"{', '.join(OPTIONS)}. Correct or remove it.",
            )
    return options
