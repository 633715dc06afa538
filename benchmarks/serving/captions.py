# SPDX-License-Identifier: Apache-2.0
"""What stands above a table: the machine and the code that its rows are of."""

from __future__ import annotations

import pandas as pd

from benchmarks.markdown import texts


def caption(found: pd.DataFrame, first: str = "") -> str:
    """Return what rows were measured on, each once, behind one of their columns."""
    prefix = f"{{{first}}}, " if first else ""
    pattern = f"{prefix}{{on}}, vLLM {{vllm}}, commit {{commit}}{{with_flags}}"
    flags = [
        f", `{flags}`" if flags else ""
        for flags in found.get("flags", [""] * len(found))
    ]
    on = found["gpu"].replace("none", "no GPU")
    told = texts(found.assign(on=on, with_flags=flags), pattern)
    return "; ".join(dict.fromkeys(told)) + ":"
