# SPDX-License-Identifier: Apache-2.0
"""How a kernel finds the fields of a request's row; see `vllm_roco.eviction_row`."""

from __future__ import annotations

import triton.language as tl

from vllm_roco import eviction_row
from vllm_roco.eviction_row import EvictionRow

NUM_ROW_FIELDS = tl.constexpr(eviction_row.NUM_ROW_FIELDS)
RESIDENT_BLOCKS = tl.constexpr(EvictionRow._fields.index("resident_blocks"))
STRIDE_BLOCKS = tl.constexpr(EvictionRow._fields.index("stride_blocks"))
UNTIL = tl.constexpr(EvictionRow._fields.index("until"))
SINK = tl.constexpr(EvictionRow._fields.index("sink"))
RECENT = tl.constexpr(EvictionRow._fields.index("recent"))
SHIELD_BLOCKS = tl.constexpr(EvictionRow._fields.index("shield_blocks"))
FLAGS = tl.constexpr(EvictionRow._fields.index("flags"))
SEED = tl.constexpr(EvictionRow._fields.index("seed"))

SCORE_SUM = tl.constexpr(eviction_row.SCORE_SUM)
SCORE_NONE = tl.constexpr(eviction_row.SCORE_NONE)
SCORE_RANDOM = tl.constexpr(eviction_row.SCORE_RANDOM)
SCORE_MASK = tl.constexpr(eviction_row.SCORE_MASK)
SHIELD_BY_DEVIATION = tl.constexpr(eviction_row.SHIELD_BY_DEVIATION)
SHIELD_BY_CONTRIBUTION = tl.constexpr(eviction_row.SHIELD_BY_CONTRIBUTION)

NEIGHBOUR_SHARE = tl.constexpr(eviction_row.NEIGHBOUR_SHARE)
