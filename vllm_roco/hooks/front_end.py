# SPDX-License-Identifier: Apache-2.0
"""What reads an engine from outside: metrics, and the check of an installation."""

from __future__ import annotations

from vllm_roco.hook_check import Hook

METRICS = (
    Hook(
        module="vllm",
        name="LLM",
        why="find the numbers of its engine",
        members=("llm_engine",),
    ),
    Hook(
        module="vllm.v1.engine.llm_engine",
        name="LLMEngine",
        why="find the numbers of an engine",
        members=("vllm_config",),
    ),
    Hook(
        module="vllm.v1.engine.async_llm",
        name="AsyncLLM",
        why="find the numbers of an engine",
        members=("vllm_config",),
    ),
)

VERIFYING = (
    Hook(
        module="vllm",
        name="SamplingParams",
        why="say how the tiny engine generates",
    ),
    Hook(
        module="vllm.inputs",
        name="TokensPrompt",
        why="give the tiny engine its prompts",
    ),
    Hook(
        module="vllm.plugins",
        name="load_general_plugins",
        why="check that the plugin is found",
        calls=(),
    ),
)
