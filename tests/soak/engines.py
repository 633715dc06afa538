# SPDX-License-Identifier: Apache-2.0
"""The engine of a soak, in this process; `tests.soak.server` has one behind HTTP."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import AutoConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.v1.engine.async_llm import AsyncLLM

from tests.soak.adapter import save_adapter
from tests.soak.audit import AUDIT_FILE
from tests.soak.clients import ADAPTER
from tests.soak.in_process_client import InProcessClient
from tests.soak.mix import Limits
from tests.soak.ranks import Ranks
from tests.soak.run import Plan, Report, Soak
from tests.soak.setups import (
    engine_arguments,
    limits_for,
    rank_arguments,
    save_small_model,
)
from tests.soak.tokenizer import save_tokenizer
from tools.packaged_models import SMOLLM2, find_model, is_at_hand

ROOT = Path(__file__).parents[2]
"""What an engine core must find this folder in."""


@dataclass
class Host:
    """Where a soak runs, and with what.

    Attributes:
        folder: For files of the run.
        model: A Hugging Face folder; None for a small and random one.
        tokenizer: A folder whose tokenizer that one has. None for SmolLM2's where that
            is at hand, else one of the repository's pages.
        windows: Whether every other layer of that one has a sliding window.
        adapter: Whether requests may bring a LoRA adapter.
        sleep_mode: Whether weights and caches leave the device when the engine sleeps.
        dtype: Of weights and cache.
        max_num_seqs: Most requests in a step, None for what suits the platform.
        num_blocks: Blocks of the cache, likewise.
        tensor: Ranks that share each layer's heads; more than one on CPUs only.
        pipeline: Stages that share the layers, likewise.
        agree: Whether tensor ranks choose together.

    Raises:
        ValueError: There are several ranks, and not on a CPU.
    """

    folder: Path
    model: Path | None = None
    tokenizer: Path | None = None
    windows: bool = False
    adapter: bool = False
    sleep_mode: bool = False
    dtype: str = "float32"
    max_num_seqs: int | None = None
    num_blocks: int | None = None
    tensor: int = 1
    pipeline: int = 1
    agree: bool = True

    def __post_init__(self) -> None:
        """Refuse what is not looked into."""
        if self.num_ranks > 1 and not current_platform.is_cpu():
            raise ValueError("several ranks are looked into on CPUs only")

    @property
    def num_ranks(self) -> int:
        """Workers that share the model."""
        return self.tensor * self.pipeline

    @property
    def ranks(self) -> Ranks | None:
        """What all ranks have done, if there are several."""
        if self.num_ranks == 1:
            return None
        return Ranks(self.audit, self.tensor, self.pipeline, agree=self.agree)

    @property
    def seqs(self) -> int:
        """Most requests in a step."""
        return self.max_num_seqs or (128 if current_platform.is_cuda() else 16)

    @property
    def sleep_level(self) -> int:
        """Level at which the engine can sleep: CPUs ignore what else there is to do."""
        return int(self.sleep_mode or not current_platform.is_cuda())

    @property
    def audit(self) -> Path:
        """The file of `tests.soak.audit`."""
        return self.folder / "audit.json"

    @property
    def _num_blocks(self) -> int:
        # a request alone may come to hold 64, and most want about ten
        number = max(72, 4 * self.seqs)
        # of which layers with a window take their own
        return 2 * number if self.windows else number

    def find_model(self) -> Path:
        """Return the model's folder, and make it if need be."""
        if self.model is None:
            if self.tokenizer is None:
                if is_at_hand(SMOLLM2):
                    self.tokenizer = find_model(SMOLLM2)
                else:
                    self.tokenizer = save_tokenizer(self.folder / "tokenizer")
            self.model = save_small_model(
                self.tokenizer,
                self.folder / "model",
                windows=self.windows,
            )
        return self.model

    def find_adapter(self) -> Path:
        """Return the folder of the LoRA adapter, and make it if need be."""
        folder = self.folder / "adapter"
        if not folder.exists():
            save_adapter(self.find_model(), folder)
        return folder

    def limits(self) -> Limits:
        """Return what requests must fit."""
        vocabulary = AutoConfig.from_pretrained(self.find_model()).vocab_size
        return limits_for(vocabulary, adapter=self.adapter)

    def arguments(self) -> dict[str, object]:
        """Return the engine's arguments, without the model."""
        arguments = engine_arguments(
            cuda=current_platform.is_cuda(),
            dtype=self.dtype,
            max_num_seqs=self.seqs,
            num_blocks=self.num_blocks or self._num_blocks,
            adapter=self.adapter,
        )
        if self.num_ranks > 1:
            arguments |= rank_arguments(
                tensor=self.tensor, pipeline=self.pipeline, agree=self.agree
            )
        return arguments | ({"enable_sleep_mode": True} if self.sleep_mode else {})


async def soak_in_process(host: Host, plan: Plan, say: Callable[[str], None]) -> Report:
    """Soak an engine without a server; see `Soak` for the rest.

    Args:
        host: Where and with what.
        plan: How much there is to do.
        say: Takes lines of progress.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(AUDIT_FILE, str(host.audit))
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        engine_args = AsyncEngineArgs(model=str(host.find_model()), **host.arguments())
        engine = AsyncLLM.from_engine_args(engine_args)
        try:
            adapter = None
            if host.adapter:
                adapter = LoRARequest(ADAPTER, 1, str(host.find_adapter()))
            soak = Soak(
                *(InProcessClient(engine, host.sleep_level, adapter), plan),
                host.limits(),
                *(host.audit, os.getpid(), say, host.ranks),
            )
            return await soak.run()
        finally:
            engine.shutdown()
