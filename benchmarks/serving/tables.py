# SPDX-License-Identifier: Apache-2.0
"""The tables of serving and kernels, as docs/performance.md and README.md show them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
from scipy.stats import gmean

from benchmarks import rows
from benchmarks.markdown import UNMEASURED, grid, lines, table, texts
from benchmarks.rows import matching
from benchmarks.serving.captions import caption
from benchmarks.serving.comparisons import (
    comparisons,
    newest_settings,
    of_first_gpu,
    other_shield,
    prefix_comparisons,
    ratio,
)
from benchmarks.serving.online_report import at_once, online
from benchmarks.serving.workloads import WORKLOADS

_SERVED = {
    "memory": "{memory}",
    "requests": "{num_requests} x ({input_len} + {output_len})",
    "engine": "{engine}",
    "tokens/s": "{output_tok_s:,.0f}",
    "ratio": "{spread}",
    "TTFT ms": "{ttft_ms:,.0f}",
    "TPOT ms": "{tpot_ms:,.2f}",
    "running": "{max_running:,.0f}",
    "preempted": "{preemptions:,.0f}",
    "rounds": "{rounds}",
}

_TOLD = {"memory": "memory {}, ", "requests": "{}, ", "rounds": "{} rounds, "}
"""Columns that need not be there if all rows have the same, and words for that."""


def tables(results: Path) -> dict[str, str]:
    """Return Markdown by name, also for what has no rows.

    Args:
        results: Folder of the CSV files.
    """
    names = (*WORKLOADS, "throughput", *_OTHERS, "online", "many-long-prompts")
    found = dict.fromkeys(names, UNMEASURED)
    if not (served := rows.read(results / "serving.csv")).empty:
        found |= serving(served)
    for name, shown in _OTHERS.items():
        if not (measured := rows.read(results / f"{name}.csv")).empty:
            found[name] = shown(measured)
    if not (asked := rows.read(results / "serving_online.csv")).empty:
        found |= {"online": online(asked), "many-long-prompts": at_once(asked)}
    return found


def serving(served: pd.DataFrame) -> dict[str, str]:
    """Return the table of each workload, and the one for a front page."""
    if (found := comparisons(served)).empty:
        return {}
    sizes = (found["kv_cache_bytes"] / 2**30).map("{:.2f} GiB KV".format)
    shares = found["gpu_memory_utilization"].astype(str) + _of_other_gpus(found)
    found["memory"] = sizes.where(found["kv_cache_bytes"].notna(), shares)
    found["share"] = 100 * found["gpu_memory_utilization"]
    found["spread"] = _spread(found)
    result = {
        str(workload): _workload(group)
        for workload, group in found.groupby("workload", sort=False)
    }
    if not (stress := matching(found, workload="r-kv-stress")).empty:
        cell = "{output_tok_s:,.0f} ({ratio:.2f})"
        stress = of_first_gpu(stress)
        result["throughput"] = grid(stress, {"memory": "{share:g} %"}, "{engine}", cell)
    return result


def _workload(rows: pd.DataFrame) -> str:
    """Return a workload's table; what all rows share stands in the caption."""
    told = {title: texts(rows, _SERVED[title]) for title in _TOLD}
    shared = {title: each[0] for title, each in told.items() if len({*each}) == 1}
    before = "".join(
        _TOLD[title].format(text)
        for title, text in shared.items()
        # of one nothing needs to be said
        if (title, text) != ("rounds", "1")
    )
    columns = {name: cell for name, cell in _SERVED.items() if name not in shared}
    return lines(rows, columns, before + caption(rows.drop_duplicates("work"), "model"))


def _spread(found: pd.DataFrame) -> pd.Series[str]:
    """Return the ratios as text, with their extremes where there are several."""
    alone, several = (
        pd.Series(texts(found, cell), found.index, dtype="string")
        for cell in ("{ratio:.3f}", "{ratio:.2f} ({ratio_low:.2f} to {ratio_high:.2f})")
    )
    return alone.where((found["rounds"] == 1) | (found["rank"] == 0), several)


def _of_other_gpus(found: pd.DataFrame) -> pd.Series[str]:
    """Return of which GPU a share of memory is, empty for that of the first row."""
    cards = found["gpu"].str.removeprefix("NVIDIA ").str.split().str[0]
    return (" of " + cards).where(found["gpu"] != found["gpu"].iloc[0], "")


def prefill(measured: pd.DataFrame) -> str:
    """Return tables of the times to first token, each beside FLASH_ATTN's."""
    prompts = ["batch", "input_len"]
    engines = [*prompts, "backend", "policy", "shield", "budget", "chunk"]
    parts = []
    for setting in newest_settings(measured):
        # the newest of each round counts
        rounds = setting.drop_duplicates([*engines, "round"], keep="last")
        found = rounds.groupby(engines, sort=False, dropna=False).agg(
            time=("ttft_ms", "mean"),
            low=("ttft_low_ms", "min"),
            high=("ttft_high_ms", "max"),
            rounds=("round", "size"),
        )
        found = found.reset_index()
        found["ratio"] = ratio(found, "time", found["backend"] != "ROCO", prompts)
        roco = found["policy"] + found["shield"].map(other_shield)
        found["engine"] = roco.where(found["policy"] != "", found["backend"])
        place = found.groupby(prompts, sort=False).ngroup()
        columns = {
            "prompts": "{batch} x {input_len}",
            "engine": "{engine}",
            "budget": "{budget}",
            "chunk": "{chunk}",
            "TTFT ms": "{time:.1f} ({low:.1f} to {high:.1f})",
            "ratio": "{ratio:.3f}",
            "rounds": "{rounds}",
        }
        found = found.iloc[place.argsort(kind="stable")]
        parts.append(lines(found, columns, caption(setting.tail(1), "model")))
    return "\n\n".join(parts)


def prefixes(measured: pd.DataFrame) -> str:
    """Return the table of what prefixes that requests share come to."""
    if (found := prefix_comparisons(measured)).empty:
        return UNMEASURED
    warm = found["warm"].map({"yes": ", read before", "no": ""})
    found = found.assign(requests=found["workload"] + warm, spread=_spread(found))
    columns = {
        "requests": "{requests}",
        "engine": "{engine}",
        "tokens/s": "{output_tok_s:,.0f}",
        "ratio": "{spread}",
        "TTFT ms": "{ttft_ms:,.0f}",
        "P99": "{ttft_p99_ms:,.0f}",
        "hits": "{hit_rate:.1%}",
        "preempted": "{preemptions:g}",
        "rounds": "{rounds}",
    }
    return lines(found, columns, caption(found.drop_duplicates("work"), "model"))


def eviction(measured: pd.DataFrame) -> str:
    """Return the table of a step's end."""
    kinds = [name[:-3] for name in map(str, measured) if name.endswith("_us")]
    cells = {
        f"{kind.replace('_', ' ')}, us": f"{{{kind}_us:.1f}} ({{{kind}_low:.1f}} to "
        f"{{{kind}_high:.1f}})"
        for kind in kinds
    }
    for column in ("nothing_due_share", "all_due_steps", "moved_blocks"):
        cells[column.replace("_", " ")] = f"{{{column}}}"
    turned = pd.DataFrame(
        [texts(measured, cell) for cell in cells.values()], columns=measured["policy"]
    )
    turned.insert(0, "what", list(cells))
    return table(turned, caption(measured, "policy"))


def profile(measured: pd.DataFrame) -> str:
    """Return the table of decode steps: what takes their time, in microseconds."""
    found = []
    for _, group in measured.groupby(["variant", "step"], sort=False):
        is_attention = group["kernel"].str.contains("FlashAttnFwd|attend_kernel")
        is_evicting = (group["ours"] == "yes") & ~is_attention
        attention, evicting = (
            float(group.loc[chosen, "us"].sum())
            for chosen in (is_attention, is_evicting)
        )
        times = {"attention": attention, "evicting": evicting}
        others = float(group["us"].sum()) - attention - evicting
        found.append(group.iloc[0].to_dict() | times | {"others": others})
    columns = {
        "step": "{variant}, {step}",
        "us": "{step_us:,.0f}",
        "attention": "{attention:,.0f}",
        "scoring, choosing, moving": "{evicting:,.0f}",
        "other kernels": "{others:,.0f}",
        "GPU idle": "{idle_us:,.0f}",
        "scheduler meanwhile": "{scheduler_us:,.0f}",
    }
    return lines(pd.DataFrame(found), columns, caption(measured.tail(1), "model"))


def scheduler(measured: pd.DataFrame) -> str:
    """Return the table of the scheduler's Python, of the newest code on each vLLM."""
    newest = measured.groupby("vllm")["commit"].transform("last")
    found = measured[measured["commit"] == newest]
    case = ["vllm", "running", "waiting", "short_of"]
    waits = " for " + found["short_of"]
    found = found.assign(
        ratio=ratio(found, "schedule_us", found["side"] == "stock", case),
        what=waits.mask(found["short_of"] == "", ""),
    )
    columns = {
        "vLLM": "{vllm}",
        "requests": "{running:,} run, {waiting:,} wait{what}",
        "scheduler": "{side}",
        **{
            f"{name}, us": f"{{{name}_us:,.0f}} ({{{name}_low:,.0f}} to "
            f"{{{name}_high:,.0f}}), mean {{{name}_mean:,.0f}}"
            for name in ("schedule", "update")
        },
        "schedule, ratio": "{ratio:.3f}",
    }
    return lines(found, columns, caption(found.drop_duplicates("vllm"), "cpu"))


def request_options(measured: pd.DataFrame) -> str:
    """Return the table of steps whose requests have options, of each model's newest."""
    newest = measured.groupby(["gpu", "model"])["commit"].transform("last")
    found = measured[measured["commit"] == newest]
    columns = {
        "model": "{model}",
        "decode steps": "{num_requests} requests, {case}",
        "options": "{options}",
        "step, us": "{step_us:,.0f} ({step_low:,.0f} to {step_high:,.0f})",
        "ratio to equal ones": "{ratio:.3f} ({ratio_low:.3f} to {ratio_high:.3f})",
        "rounds": "{rounds}",
    }
    return lines(found, columns, caption(found))


def memory(measured: pd.DataFrame) -> str:
    """Return the table of what sequences hold."""
    columns = (
        *("model", "backend", "max_running", "preemptions"),
        *("peak_sequence_tokens", "bound_tokens"),
    )
    newest = _of_newest_code(measured)
    titles = {name.replace("_", " "): f"{{{name}}}" for name in columns}
    return lines(newest, titles, caption(newest.tail(1)))


def decode(measured: pd.DataFrame) -> str:
    """Return the table of the decode kernel."""
    return _kernel(measured, "ratio")


def decode_fp8(measured: pd.DataFrame) -> str:
    """Return the table of the decode kernel over an fp8 cache."""
    return _kernel(measured, "fp8_ratio")


def _kernel(measured: pd.DataFrame, column: str) -> str:
    ratios = measured[column].to_numpy(float)
    return grid(
        measured,
        {"heads": "{q_heads}/{kv_heads}/{head_size}"},
        "{batch} x {context}",
        f"{{{column}:.3f}}",
        f"geometric mean {gmean(ratios):.3f}, smallest {ratios.min():.3f}, "
        f"{measured['gpu'].iloc[-1]}:",
    )


def uneven_rows(measured: pd.DataFrame) -> str:
    """Return the table of the decode kernel over rows of different lengths."""
    found = _of_newest_code(measured)
    return grid(
        found.sort_values(["batch", "shortest"]),
        {
            "tokens of a row": "{shortest:,.0f} to {longest:,.0f}",
            "heads": "{q_heads}/{kv_heads}/{head_size}",
        },
        "{batch} rows",
        "{ratio:.2f}",
        caption(found.head(1)),
    )


def tensor_descriptors(measured: pd.DataFrame) -> str:
    """Return the table of decode kernels that load by TMA, the best of each shape."""
    found = _of_newest_code(measured)
    found = found[(found["kernel"] == "flash") | (found["statistics"] == "yes")]
    names = found["kernel"].map(
        {"flash": "FlashAttention 3", "roco": "roco", "tma": "by TMA"}
    )
    blocks = ", blocks of " + found["block_size"].astype("string")
    setting = pd.Series(
        texts(found, ", {num_stages} stages, {num_warps} warps"), found.index
    )
    shape = ["batch", "context", "q_heads", "kv_heads", "head_size"]
    found = found.assign(
        column=names + blocks.mask(found["kernel"] == "flash", ""), setting=setting
    )
    # what runs in every turn is shown as of the first
    places = [*shape, "column", "tile"]
    best = found.loc[found.groupby(places, sort=False)["us"].idxmin()]
    best = best.drop_duplicates([*shape, "column"])
    return grid(
        best,
        {
            "sequences x tokens": "{batch} x {context}",
            "heads": "{q_heads}/{kv_heads}/{head_size}",
        },
        "{column}",
        "{us:,.0f} ({ratio:.3f}){setting}",
        caption(best.head(1)),
        best.sort_values(["kernel", "block_size"])["column"].unique(),
    )


def _of_newest_code(measured: pd.DataFrame) -> pd.DataFrame:
    last = measured.iloc[-1]
    names = ("gpu", "vllm", "commit", "flags")
    return matching(measured, **{name: last[name] for name in names if name in last})


_OTHERS: dict[str, Callable[[pd.DataFrame], str]] = {
    "prefill": prefill,
    "prefixes": prefixes,
    "eviction": eviction,
    "profile": profile,
    "scheduler": scheduler,
    "request_options": request_options,
    "memory": memory,
    "decode_attention": decode,
    "decode_fp8": decode_fp8,
    "uneven_rows": uneven_rows,
    "tensor_descriptors": tensor_descriptors,
}
"""Tables beside those of `WORKLOADS`, by the name of their CSV file."""
