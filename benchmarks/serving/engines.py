# SPDX-License-Identifier: Apache-2.0
"""What vLLM is told about an engine and its requests, and how a row names it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_roco.config import NAMESPACE, RocoConfig

DEFAULT = RocoConfig()
MODELS = Path(__file__).parents[1] / "models"


@dataclass(frozen=True)
class Requests:
    """Equal requests that arrive at once; lengths in tokens."""

    count: int
    input_len: int
    output_len: int

    @property
    def max_model_len(self) -> int:
        """A length that holds a request; random text may be a few tokens longer."""
        return -(-(self.input_len + self.output_len + 16) // 256) * 256

    @property
    def columns(self) -> dict[str, object]:
        """The columns of a row that tell them from others."""
        return {
            "num_requests": self.count,
            "input_len": self.input_len,
            "output_len": self.output_len,
        }


@dataclass(frozen=True, kw_only=True)
class Engine:
    """An engine, whose batches it is made for.

    Attributes:
        model: Folder of `MODELS`.
        batches: What it will serve, one after another.
        roco: The plugin's options; None for stock vLLM.
        stock: The attention backend of stock vLLM.
        kv_cache_dtype: `auto` is the model's.
        gpu_memory_utilization: vLLM's option.
        kv_cache_bytes: KV memory of each GPU; None: what the option above leaves.
        tensor_parallel_size: GPUs that share the heads of each layer.
        prefix_caching: Whether what one request has read serves others.
    """

    model: str
    batches: tuple[Requests, ...]
    roco: RocoConfig | None = None
    stock: str = "FLASH_ATTN"
    kv_cache_dtype: str = "auto"
    gpu_memory_utilization: float = 0.9
    kv_cache_bytes: int | None = None
    tensor_parallel_size: int = 1
    prefix_caching: bool = False

    @property
    def backend(self) -> str:
        """vLLM's name of the attention backend."""
        return self.stock if self.roco is None else "ROCO"

    @property
    def columns(self) -> dict[str, object]:
        """The columns of a row that tell it from others; a table picks its own."""
        names = (
            *("policy", "shield", "budget", "stride", "chunk"),
            *("prefill_tokens", "prefix_hits"),
        )
        roco = {name: getattr(self.roco, name, None) for name in names}
        if roco["policy"] == "recent":
            roco["shield"] = None
        if roco["prefix_hits"] == DEFAULT.prefix_hits:
            roco["prefix_hits"] = None
        apart = self.roco is not None and not self.roco.agree
        reads_again = self.roco is not None and self.roco.answer_start_token_ids == ()
        return {
            "model": self.model,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "kv_cache_bytes": self.kv_cache_bytes,
            "backend": self.backend,
            "kv_cache_dtype": self.kv_cache_dtype,
            **roco,
            "ranks": "apart" if apart else None,
            "answers": "read again" if reads_again else None,
        }

    def command(self, common: Sequence[str]) -> list[str]:
        """Return what every benchmark of vLLM is told about it.

        Args:
            common: What every engine is told, the tokenizer among it; has precedence.
        """
        names = [
            *("policy", "budget", "max_budget", "stride", "chunk"),
            *("prefill_tokens", "answer_start_token_ids", "trace"),
        ]
        given = {name: getattr(self.roco, name, None) for name in names}
        for name in ("agree", "prefix_hits"):
            default = getattr(DEFAULT, name)
            if (value := getattr(self.roco, name, default)) != default:
                given[name] = value
        told = {name: value for name, value in given.items() if value is not None}
        memory = f"--kv-cache-memory-bytes={self.kv_cache_bytes}"
        return [
            f"--model={MODELS / self.model}",
            # the cost of attention does not depend on the weights
            "--load-format=dummy",
            f"--max-model-len={max(batch.max_model_len for batch in self.batches)}",
            f"--max-num-seqs={max(batch.count for batch in self.batches)}",
            f"--gpu-memory-utilization={self.gpu_memory_utilization}",
            f"--tensor-parallel-size={self.tensor_parallel_size}",
            f"--{'' if self.prefix_caching else 'no-'}enable-prefix-caching",
            "--disable-detokenize",
            f"--attention-backend={self.backend}",
            f"--kv-cache-dtype={self.kv_cache_dtype}",
            f"--additional-config={json.dumps({NAMESPACE: told} if told else {})}",
            *([memory] if self.kv_cache_bytes is not None else []),
            *common,
        ]
