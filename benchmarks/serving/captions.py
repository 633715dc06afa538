# SPDX-License-Identifier: Apache-2.0
"""What stands above a table: the machine and the code that its rows are of."""

from __future__ import annotations

import json
import shlex

import pandas as pd

from benchmarks.markdown import texts


def caption(found: pd.DataFrame, first: str = "") -> str:
    """Return what rows were measured on, each once, behind one of their columns.

    Flags that all of them share stand once, at the end.
    """
    prefix = f"{{{first}}}, " if first else ""
    on = found["gpu"].replace("none", "no GPU")
    flags = [_code(flags) for flags in found.get("flags", [""] * len(found))]
    shared = flags[0] if len({*flags}) == 1 else ""
    own = ["" if shared or not each else f", {each}" for each in flags]
    pattern = f"{prefix}{{on}}, vLLM {{vllm}}, commit {{commit}}{{own}}"
    told = list(dict.fromkeys(texts(found.assign(on=on, own=own), pattern)))
    together = ("; all with " if len(told) > 1 else ", ") + shared if shared else ""
    return "; ".join(told) + together + ":"


def _code(flags: str) -> str:
    """Return flags as code, alike however their JSON was spaced; empty for none."""
    return f"`{shlex.join(map(_compact, shlex.split(flags)))}`" if flags else ""


def _compact(word: str) -> str:
    if not word.startswith("{"):
        return word
    return json.dumps(json.loads(word), separators=(",", ":"))
