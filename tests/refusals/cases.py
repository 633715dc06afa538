# SPDX-License-Identifier: Apache-2.0
"""What is refused, and what the message has to say."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

OPTIONS = {"budget": 128, "stride": 32, "chunk": 64}


@dataclass(frozen=True)
class Case:
    """Engine arguments that are refused, and what the message has to say.

    Attributes:
        says: Parts of the message, in order.
        options: Put over `OPTIONS`.
        arguments: Of `EngineArgs`.
    """

    says: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)


def arguments_of(model: Path, case: Case) -> dict[str, Any]:
    return {
        "model": str(model),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 1024,
        "enforce_eager": True,
        "attention_backend": "roco",
        "additional_config": {"roco": OPTIONS | case.options},
    } | case.arguments


def engine_config(model: Path, case: Case) -> VllmConfig:
    return EngineArgs(**arguments_of(model, case)).create_engine_config()


def refused(message: str, case: Case) -> None:
    place = message.find("roco: ")
    for part in case.says:
        place = message.find(part, place)
        assert place >= 0, f"{part!r} is not in {message!r}"
