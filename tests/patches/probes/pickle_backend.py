# SPDX-License-Identifier: Apache-2.0
"""Prints pickled backends, or with such an argument what they unpickle to."""

import base64
import json
import pickle
import sys

from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

PATH = "probe.Backend"


def dump() -> dict[str, str]:
    """Return pickles of a registered member and of members of vLLM's own."""
    register_backend("PROBE", PATH)
    return {
        name: base64.b64encode(pickle.dumps(AttentionBackendEnum[name])).decode()
        for name in ("FLASH_ATTN", "CUSTOM", "PROBE")
    }


def load(pickles: dict[str, str]) -> dict[str, str]:
    """Return the names of the members, before and after a plugin registers its own."""
    found = {}
    for name, pickled in pickles.items():
        try:
            found[name] = pickle.loads(base64.b64decode(pickled)).name
        except ValueError as error:
            found[name] = str(error)
    register_backend("PROBE", PATH)
    found["registered again"] = AttentionBackendEnum["PROBE"].name
    return found


pickles = json.loads(sys.argv[1])
print(json.dumps(load(pickles) if pickles else dump()))
