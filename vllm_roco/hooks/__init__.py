# SPDX-License-Identifier: Apache-2.0
"""Every place where the plugin leans on vLLM, as data.

vLLM promises none of these names. Each is listed once, with what is needed of it and
why, so that a release can be checked before it is used: the installed one by
`vllm_roco.compat.missing_hooks`, any other one by `tools/check_vllm.py`.
"""

from __future__ import annotations

from vllm_roco.hooks.attention import ATTENTION
from vllm_roco.hooks.configuration import CONFIGURATION, NAMING
from vllm_roco.hooks.front_end import METRICS, VERIFYING
from vllm_roco.hooks.kv_cache import KV_CACHE
from vllm_roco.hooks.platforms import PLATFORMS
from vllm_roco.hooks.scheduling import SCHEDULING

HOOKS = (
    *NAMING,
    *CONFIGURATION,
    *ATTENTION,
    *KV_CACHE,
    *SCHEDULING,
    *METRICS,
    *VERIFYING,
    *PLATFORMS,
)
