# SPDX-License-Identifier: Apache-2.0
"""Requests that share prefixes, and the engines that serve them, cached or not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, product

import numpy as np

from benchmarks.serving.engines import MODELS, Engine, Requests
from benchmarks.serving.request_shapes import RequestShape, SideRun, grouped
from benchmarks.serving.workloads import QWEN_BYTES_PER_TOKEN
from vllm_roco.config import RocoConfig

SIDES = ("stock", "roco", "roco-uncached")
"""The baseline first; the last one has vLLM's prefix caching off."""
TOKEN_IDS = (1000, 40000)
"""Ids of random text, which every model's vocabulary holds."""
GENERATION_PROMPT = (101, 102, 103, 104)
"""What stands for a chat template's, behind the last message; in no random text."""


@dataclass(frozen=True, kw_only=True)
class PrefixWorkload(RequestShape):
    """Equal requests, which begin with prefixes in rotation and arrive at once.

    Attributes:
        suffix_len: Tokens that only one request has, and in a turn reads anew.
        num_turns: A turn's requests arrive when all of the turn before are answered,
            and go on from what was read and written there.
        max_tokens: What clients ask for; more than `output_len` ends with a stop token.
        configs: RoCo's options; without a cache the first ones only.
        warm: Whether the prefixes have been read before the clock starts.
        max_num_seqs: Requests that run at once; None: all.
        kv_cache_bytes: KV memory of every side; None: what half of the GPU leaves.
        over_http: Whether vLLM's own client asks a server.
    """

    suffix_len: int
    num_prefixes: int = 1
    num_turns: int = 1
    max_tokens: int | None = None
    configs: tuple[RocoConfig, ...] = (RocoConfig(budget=2048),)
    warm: tuple[bool, ...] = (False,)
    max_num_seqs: int | None = None
    kv_cache_bytes: int | None = None
    over_http: bool = False

    @property
    def requests(self) -> Requests:
        """What an engine must have room for: the last turn's."""
        before = (self.num_turns - 1) * (self.suffix_len + self.output_len)
        return Requests(
            self.max_num_seqs or self.num_requests,
            self.prefix_len + before + self.suffix_len,
            self.max_tokens or self.output_len,
        )

    @property
    def columns(self) -> dict[str, object]:
        """The columns of a row that tell the requests from others."""
        counts = ("num_requests", "num_prefixes", "num_turns")
        lengths = ("prefix_len", "suffix_len", "output_len", "max_tokens")
        return self.named(*counts, *lengths)


_DOCUMENT, _QUESTION, _ANSWER = 8192, 64, 64

PREFIX_WORKLOADS = {
    "shared-4096": PrefixWorkload(
        about="128 requests behind one prefix of 4K tokens",
        num_requests=128,
        prefix_len=4096,
        suffix_len=256,
        output_len=256,
        configs=(RocoConfig(budget=2048), RocoConfig(budget=1024)),
        warm=(True, False),
    ),
    "shared-16384": PrefixWorkload(
        about="64 requests behind one prefix of 16K tokens",
        num_requests=64,
        prefix_len=16384,
        suffix_len=256,
        output_len=256,
        warm=(True, False),
    ),
    "chat": PrefixWorkload(
        about="64 conversations of 8 turns with one system prompt",
        num_requests=64,
        prefix_len=1024,
        suffix_len=300,
        output_len=200,
        num_turns=8,
        configs=(
            # of a model's template a server knows by itself
            RocoConfig(budget=2048, answer_start_token_ids=GENERATION_PROMPT),
            RocoConfig(budget=2048, answer_start_token_ids=()),
            RocoConfig(budget=2048, prefix_hits="longest"),
        ),
    ),
    "header-800": PrefixWorkload(
        about="8 prefixes of 800 tokens, nothing reaches its budget",
        num_requests=256,
        num_prefixes=8,
        prefix_len=800,
        suffix_len=200,
        output_len=128,
    ),
    "header-800-open": PrefixWorkload(
        about="the same from clients that would take 4K tokens, but get a stop token",
        num_requests=256,
        num_prefixes=8,
        prefix_len=800,
        suffix_len=200,
        output_len=128,
        max_tokens=4096,
    ),
    "distinct": PrefixWorkload(
        about="nothing is shared: what the cache itself costs",
        num_requests=256,
        prefix_len=0,
        suffix_len=1024,
        output_len=256,
    ),
    "documents": PrefixWorkload(
        about="200 documents of 8K tokens, asked three times each in rotation",
        num_requests=600,
        num_prefixes=200,
        prefix_len=_DOCUMENT,
        suffix_len=_QUESTION,
        output_len=_ANSWER,
        max_num_seqs=32,
        # a third of them in full, or what a budget of 2,048 keeps of all, and what runs
        kv_cache_bytes=67 * (_DOCUMENT + _QUESTION + _ANSWER) * QWEN_BYTES_PER_TOKEN,
    ),
    "prefix-repetition": PrefixWorkload(
        about="vllm bench serve over HTTP, 4 prefixes of 4K tokens",
        num_requests=128,
        num_prefixes=4,
        prefix_len=4096,
        suffix_len=256,
        output_len=256,
        over_http=True,
    ),
    "prefix-smoke": PrefixWorkload(
        about="seconds on any machine: whether the benchmark itself works",
        model="smollm2-135m",
        num_requests=4,
        num_prefixes=2,
        prefix_len=128,
        suffix_len=16,
        output_len=8,
        num_turns=2,
        max_tokens=64,
        configs=(RocoConfig(budget=64),),
        warm=(True, False),
        kv_cache_bytes=2**26,
    ),
}


@dataclass(frozen=True, kw_only=True)
class PrefixRun(SideRun):
    """What fills one row.

    Attributes:
        name: Key of `PREFIX_WORKLOADS`; `side` is one of `SIDES`.
        warm: Whether the prefixes have been read before the clock starts.
    """

    warm: bool

    @property
    def workload(self) -> PrefixWorkload:
        """What is served."""
        return PREFIX_WORKLOADS[self.name]

    @property
    def columns(self) -> dict[str, object]:
        """The columns of `prefixes.csv` that tell this run from others."""
        return {
            **{"workload": self.name, "side": self.side},
            **{"warm": "yes" if self.warm else "no", "round": self.number},
            **self.engine.columns,
            **self.workload.columns,
        }


def prefix_runs(
    names: Sequence[str],
    sides: Sequence[str] = SIDES,
    *,
    budgets: Sequence[int] | None = None,
    rounds: int = 1,
    gpu_memory_utilization: float = 0.5,
    baseline: str = "FLASH_ATTN",
) -> list[PrefixRun]:
    """Return the runs, those of one engine next to each other.

    Args:
        names: Keys of `PREFIX_WORKLOADS`.
        sides: Of `SIDES`.
        budgets: Instead of the workloads' options.
        rounds: How often each engine has its turn.
        gpu_memory_utilization: vLLM's option, of every side.
        baseline: The attention backend of stock vLLM.
    """

    def engine(workload: PrefixWorkload, side: str, config: RocoConfig) -> Engine:
        return Engine(
            model=workload.model,
            # whichever are selected: a row means the same alone
            batches=tuple(
                other.requests
                for other in PREFIX_WORKLOADS.values()
                if _place(other) == _place(workload)
            ),
            roco=None if side == "stock" else config,
            stock=baseline,
            gpu_memory_utilization=gpu_memory_utilization,
            kv_cache_bytes=workload.kv_cache_bytes,
            prefix_caching=side != "roco-uncached",
        )

    found: list[PrefixRun] = []
    for number, side, name in product(range(1, rounds + 1), sides, names):
        workload = PREFIX_WORKLOADS[name]
        several = workload.configs
        if budgets is not None:
            answers = workload.configs[0].answer_start_token_ids
            several = tuple(
                RocoConfig(budget=budget, answer_start_token_ids=answers)
                for budget in budgets
            )
        for config in several if side == "roco" else several[:1]:
            own = engine(workload, side, config)
            found += [
                PrefixRun(name=name, side=side, engine=own, warm=warm, number=number)
                for warm in workload.warm
                # nothing that was read stays
                if not (warm and side == "roco-uncached")
            ]
    groups = grouped(
        found, lambda run: (run.number, run.engine, run.workload.over_http)
    )
    return [*chain(*groups)]


def _place(workload: PrefixWorkload) -> tuple[object, ...]:
    """Return what workloads that share an engine have in common."""
    return workload.model, workload.kv_cache_bytes, workload.over_http


def text(
    workload: PrefixWorkload, *seed: int
) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Return random token ids; in conversations messages end as the model's do.

    Args:
        workload: Of which requests.
        *seed: Another one makes other text.

    Returns:
        The prefix of each request, and by turn the suffix of each.
    """
    random = np.random.default_rng(seed)
    size = workload.num_prefixes, workload.prefix_len
    prefixes = random.integers(*TOKEN_IDS, size).tolist()
    requests = range(workload.num_requests)
    each = workload.num_turns, workload.num_requests, workload.suffix_len
    turns = random.integers(*TOKEN_IDS, each).tolist()
    if workload.num_turns > 1:
        end = _end_token(workload)
        for prefix in prefixes:
            prefix[-1] = end
        for suffix in chain(*turns):
            # of the answer before it, and its own
            suffix[0] = end
            suffix[-1 - len(GENERATION_PROMPT) :] = [end, *GENERATION_PROMPT]
    return [prefixes[index % workload.num_prefixes] for index in requests], turns


def _end_token(workload: PrefixWorkload) -> int:
    config = json.loads((MODELS / workload.model / "config.json").read_text())
    return int(config["eos_token_id"])
