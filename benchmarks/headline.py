# SPDX-License-Identifier: Apache-2.0
"""The first numbers of the front page, in words that follow from the rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks import rows
from benchmarks.markdown import UNMEASURED
from benchmarks.quality.scores import Scores
from benchmarks.rows import matching
from benchmarks.serving.comparisons import comparisons, prefix_comparisons
from benchmarks.serving.online_report import limits, newest
from benchmarks.serving.online_shapes import AT_ONCE

_Works = Mapping[str, Mapping[str, object]]

_STOCK_FP8 = {"policy": "", "kv_cache_dtype": "fp8"}
_ROCO = {"policy": "roco", "kv_cache_dtype": "auto"}
_ROCO_CACHED = {"side": "roco", "budget": 2048, "chunk": 1024, "prefix_hits": ""}
_SERVED: _Works = {
    "short": {"workload": "r-kv-stress", "gpu_memory_utilization": 0.17, **_ROCO},
    "long": {"workload": "long-generation", **_ROCO},
    "fp8": {"workload": "long-generation", **_STOCK_FP8},
    "ample": {"workload": "no-pressure", **_ROCO},
}
_SHARED: _Works = {
    "prefix": {"workload": "shared-16384", "warm": "yes", **_ROCO_CACHED},
    "chat": {"workload": "chat", **_ROCO_CACHED, "answers": ""},
    "longest": {"workload": "chat", **_ROCO_CACHED, "prefix_hits": "longest"},
}
_ASKED = {
    "documents": ("long-document", 2048),
    "reasoning": ("reasoning", 1024),
    "agent": ("agent", 2048),
    "agent, less": ("agent", 1024),
}
"""Shapes of requests that arrive one by one, and budgets."""
_CONTEXT, _SHARE = 2048, 0.25


def headline(results: Path) -> str:
    """Return memory, throughput, losses and quality, a line each.

    Args:
        results: Folder of the CSV files.
    """
    served = rows.read(results / "serving.csv")
    shared = rows.read(results / "prefixes.csv")
    asked = rows.read(results / "serving_online.csv")
    scores = Scores.read(results)
    if served.empty or shared.empty or asked.empty or scores is None:
        return UNMEASURED
    found = _pairs(comparisons(served), _SERVED)
    found |= _pairs(prefix_comparisons(shared), _SHARED)
    rates = _rates(asked)
    if found.keys() != {*_SERVED, *_SHARED} or rates.keys() != _ASKED.keys():
        return UNMEASURED
    return "\n".join((*_speeds(found, rates), _quality(scores)))


def _rates(asked: pd.DataFrame) -> dict[str, Any]:
    """Return RoCo's largest rate of each shape and budget that was measured."""
    found = limits(newest(asked[asked["rate"] != AT_ONCE]))
    pairs = {
        name: matching(found, side="roco", shape=shape, budget=budget)
        for name, (shape, budget) in _ASKED.items()
    }
    return {name: rows.iloc[-1] for name, rows in pairs.items() if not rows.empty}


def _pairs(found: pd.DataFrame, works: _Works) -> dict[str, tuple[Any, Any]]:
    """Return the newest row of each work that was measured, behind stock vLLM's."""
    pairs = {}
    for name, work in works.items():
        those = matching(found, **work)
        if not those.empty:
            newest = those.iloc[-1]
            beside = matching(found, work=newest["work"], rank=0)
            pairs[name] = beside.iloc[0], newest
    return pairs


def _speeds(found: dict[str, tuple[Any, Any]], rates: dict[str, Any]) -> Iterable[str]:
    roco = {name: row for name, (_, row) in found.items()}
    stock, short = found["short"]
    yield (
        f"* **Memory**: RoCo runs all {short['max_running_low']:g} requests at once, "
        f"stock vLLM (FLASH_ATTN) at most {stock['max_running_high']:g}, with "
        f"{stock['preemptions']:g} preemptions ({_requests(short)}, "
        f"{100 * short['gpu_memory_utilization']:g} % of an {_gpu(short)}'s memory)."
    )
    long, prefix = roco["long"], roco["prefix"]
    yield (
        f"* **Throughput**: {short['ratio']:.2f} times stock vLLM's on that workload; "
        f"{long['ratio']:.2f} times with long answers ({_requests(long)}, "
        f"{long['kv_cache_bytes'] / 2**30:.1f} GiB for KV, {_gpu(long)}); "
        f"{prefix['ratio']:.2f} times behind a prefix of {prefix['prefix_len']:,.0f} "
        "tokens that all requests share and that was read before (budget "
        f"{prefix['budget']:,}, "
        f"{_gpu(prefix)})."
    )
    documents, reasoning = rates["documents"], rates["reasoning"]
    agent, less = rates["agent"], rates["agent, less"]
    yield (
        f"* **Requests a second** over HTTP within limits of latency, times stock "
        f"vLLM's ({_gpu(documents)}; in brackets over the next rate that stock vLLM "
        f"did not keep): {_rate(documents)} where documents of "
        f"{documents['input_len']:,} tokens arrive one by one ({_room(documents)}); "
        f"{_rate(reasoning)} where answers of {reasoning['output_len']:,} tokens "
        f"are written ({_room(reasoning)}); {_rate(agent)} where short requests "
        f"come behind shared prompts of {agent['prefix_len']:,.0f} tokens "
        f"({_room(agent)}), {_rate(less)} with a budget of {less['budget']:,.0f}."
    )
    ample, chat = roco["ample"], roco["chat"]
    yield (
        f"* **Not everywhere**: {ample['ratio']:.2f} times where memory is ample and "
        f"nothing is evicted ({_gpu(ample)}), {chat['ratio']:.2f} times in chats of "
        f"{chat['num_turns']:g} turns that outgrow the budget "
        f"({roco['longest']['ratio']:.2f} with `prefix_hits: longest`, {_gpu(chat)}). "
        f"An fp8 KV cache alone makes stock vLLM {found['fp8'][1]['ratio']:.2f} times "
        "as fast with the long answers."
    )


def _quality(scores: Scores) -> str:
    def of(metric: str, task: str, column: str, method: str) -> float:
        same = {"task": task, "context": _CONTEXT, "method": method}
        found = matching(scores.at_budgets(metric), **same)
        share = 1.0 if method == "full" else _SHARE
        return float(found.loc[found["budget_ratio"] == share, column].iloc[0])

    default, full, recent = (
        of("accuracy", "needle", "score", method)
        for method in (scores.default, "full", "recent")
    )
    perplexity, of_recent = (
        100 * of("perplexity", "perplexity", "of_full", method) - 100
        for method in (scores.default, "recent")
    )
    return (
        f"* **Quality**: with a budget of a quarter of {_CONTEXT:,} tokens of prose, "
        f"{default:.2f} of the facts hidden in it are found; {full:.2f} with the full "
        f"cache, {recent:.2f} with the newest blocks alone. Perplexity rises by "
        f"{perplexity:.1f} %, with the newest alone by {of_recent:.1f} %. One small "
        "model, SmolLM2-135M-Instruct."
    )


def _requests(row: Any) -> str:
    return (
        f"{row['num_requests']} requests of {row['input_len']:,} + "
        f"{row['output_len']:,} tokens, budget {row['budget']:,}"
    )


def _rate(row: Any) -> str:
    return f"{row['ratio']:.2f} ({row['least_ratio']:.2f})"


def _room(row: Any) -> str:
    return f"budget {row['budget']:,.0f}, {row['room']} for KV"


def _gpu(row: Any) -> str:
    return str(row["gpu"]).removeprefix("NVIDIA ").split()[0]
