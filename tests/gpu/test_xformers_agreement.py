# SPDX-License-Identifier: Apache-2.0
"""Outputs over live tables are xformers', which shares no code with us or with vLLM.

While an engine evicts, every layer's queries are also given to xformers, with the pages
and the live table of that moment: 16-bit ones to its paged split-K, as if each were a
sequence of its own, float32 ones to its dense CUTLASS kernel, over the gathered keys.
How far xformers is from float64 tells how far from it we may be.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.tiny_models import SMALL_BUDGET, random_prompt
from tests.gpu.engines import EAGER, gpu_engine
from vllm_roco.attention.cuda.metadata import RocoCudaMetadata

fmha = pytest.importorskip(
    "xformers.ops.fmha",
    reason="needs xformers, as in: pip install -e '.[xformers]'",
    exc_type=ImportError,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.usefixtures("engine_lock"),
]

# split-K takes pages of a multiple of this
PAGE = 64
OPTIONS = replace(
    SMALL_BUDGET, block_size=PAGE, budget=4 * PAGE, stride=PAGE, chunk=2 * PAGE
)
"""Evicts first at 320 tokens."""

PROMPTS = [random_prompt(length, seed=length) for length in (600, 33, 330, 129)]
NUM_NEW = 150
# split-K is compiled anew for each number of queries and of pages
BATCH = 128
MAX_MODEL_LEN = 1024
WIDTH = MAX_MODEL_LEN // PAGE
FLOOR = 2e-6
"""Relative error of float32 sums in another order."""


@dataclass(frozen=True)
class Row:
    """Queries of one sequence, the newest tokens of what it attends over.

    Attributes:
        query: `[num_queries, q_heads, head_size]`.
        blocks: `[num_blocks]` int64, its live blocks in order.
        length: Tokens attended by the last query.
        evicted: Whether blocks have been evicted before the step.
    """

    query: torch.Tensor
    blocks: torch.Tensor
    length: int
    evicted: bool

    @property
    def phase(self) -> str:
        when = "after" if self.evicted else "before"
        kind = "decode" if len(self.query) == 1 else "prompt"
        return f"{kind} {when} the first eviction"

    def content(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values in order, `[length, kv_heads, head_size]` each."""
        tokens = kv_cache[self.blocks].transpose(1, 2).flatten(0, 1)[: self.length]
        keys, values = tokens.chunk(2, dim=-1)
        return keys, values


def rows_of(metadata: RocoCudaMetadata, query: torch.Tensor) -> list[Row]:
    """Return a step's rows; decodes come first, with one query each."""
    counts = [1] * (metadata.decodes.num_rows if metadata.decodes else 0)
    if metadata.prefills:
        counts += metadata.prefills.query_start_loc.diff().tolist()
    step = metadata.step
    queries = query[: sum(counts)].split(counts)
    lengths, evicted = step.live_lens.tolist(), step.evicted_before.tolist()
    return [
        Row(row_query, table[: -(-length // PAGE)].long(), length, before > 0)
        for row_query, table, length, before in zip(
            queries, step.live_table, lengths, evicted, strict=True
        )
    ]


def exact(row: Row, kv_cache: torch.Tensor, scale: float) -> torch.Tensor:
    """Attend in float64; return `[num_queries, q_heads, head_size]`."""
    keys, values = (x.double() for x in row.content(kv_cache))
    group = row.query.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
    logits = torch.einsum("qhd,khd->hqk", row.query.double(), keys) * scale
    place = torch.arange(row.length, device=logits.device)
    hidden = place[None, :] > place[-len(row.query) :, None]
    weights = logits.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values)


def split_k(rows: list[Row], kv_cache: torch.Tensor, scale: float) -> torch.Tensor:
    """Attend by xformers' paged split-K; return `[num_queries, q_heads, head_size]`."""
    query = torch.cat([row.query for row in rows])
    # a query sees what came before it, and itself
    lengths = [row.length - back for row in rows for back in _backwards(row.query)]
    tables = [row.blocks for row in rows for _ in row.query]
    padding = -len(query) % BATCH
    padded = torch.nn.functional.pad(query, (0, 0, 0, 0, 0, padding))
    lengths += [1] * padding
    table = kv_cache.new_zeros(len(padded), WIDTH, dtype=torch.int32)
    for line, blocks in zip(table, tables, strict=False):
        line[: len(blocks)] = blocks
    outputs = [
        _split_k_of_a_batch(
            padded[start : start + BATCH],
            kv_cache,
            table[start : start + BATCH],
            lengths[start : start + BATCH],
            scale,
        )
        for start in range(0, len(padded), BATCH)
    ]
    return torch.cat(outputs)[: len(query)]


def _split_k_of_a_batch(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    table: torch.Tensor,
    lengths: list[int],
    scale: float,
) -> torch.Tensor:
    count, q_heads, head_size = query.shape
    num_blocks, kv_heads, _, _ = kv_cache.shape
    group = q_heads // kv_heads
    bias = fmha.attn_bias.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
        q_seqlen=[1] * count,
        kv_seqlen=lengths,
        block_tables=table,
        page_size=PAGE,
        device=query.device,
    )
    # it takes no interleaved keys and values, and reads past the length
    pages = kv_cache.transpose(1, 2).nan_to_num()
    keys, values = (
        half.reshape(1, num_blocks * PAGE, kv_heads, 1, head_size).expand(
            -1, -1, -1, group, -1
        )
        for half in pages.chunk(2, dim=-1)
    )
    output = fmha.memory_efficient_attention_forward(
        query.reshape(1, count, kv_heads, group, head_size),
        keys,
        values,
        attn_bias=bias,
        scale=scale,
        op=fmha.triton_splitk.FwOp,
    )
    return output.reshape(count, q_heads, head_size)


def _backwards(query: torch.Tensor) -> range:
    return range(len(query) - 1, -1, -1)


def cutlass(rows: list[Row], kv_cache: torch.Tensor, scale: float) -> torch.Tensor:
    """Attend by xformers' dense CUTLASS kernel; return as `split_k`."""
    outputs = []
    for row in rows:
        group = row.query.shape[1] // kv_cache.shape[1]
        keys, values = (
            x.repeat_interleave(group, 1)[None] for x in row.content(kv_cache)
        )
        output = fmha.memory_efficient_attention_forward(
            row.query.contiguous()[None],
            keys,
            values,
            attn_bias=fmha.attn_bias.LowerTriangularFromBottomRightMask(),
            scale=scale,
            op=fmha.cutlass.FwOp,
        )
        outputs.append(output[0])
    return torch.cat(outputs)


Opinion = Callable[[list[Row], torch.Tensor, float], torch.Tensor]


@dataclass
class Comparison:
    """How far outputs of one layer and phase are from xformers', in all steps.

    Attributes:
        rows: Rows compared.
        apart: Largest difference between ours and xformers'.
        error: Largest difference between xformers' and float64.
        largest: Largest number of the output.
        worst: Where ours and xformers' are farthest apart.
    """

    rows: int = 0
    apart: float = 0.0
    error: float = 0.0
    largest: float = 0.0
    worst: str = ""

    def add(
        self, row: Row, ours: torch.Tensor, theirs: torch.Tensor, true: torch.Tensor
    ) -> None:
        self.rows += 1
        difference = (ours.double() - theirs.double()).abs()
        # not by max: NaN, from whomever, must show
        apart = float("inf") if difference.isnan().any() else float(difference.max())
        if apart >= self.apart:
            self.apart = apart
            _, num_heads, head_size = difference.shape
            # NaN counts as the largest
            place = int(difference.argmax()) // head_size
            self.worst = (
                f"query {place // num_heads} of {len(row.query)}, head "
                f"{place % num_heads}, {row.length} tokens in blocks "
                f"{row.blocks.tolist()}"
            )
        self.error = max(self.error, float((theirs.double() - true).abs().max()))
        self.largest = max(self.largest, float(true.abs().max()))

    @property
    def allowed(self) -> float:
        """Ours may err twice as much as xformers', so they are three times apart."""
        return 3 * self.error + FLOOR * (1 + self.largest)

    def __str__(self) -> str:
        return (
            f"{self.rows} rows: {self.apart:.2e} apart, allowed {self.allowed:.2e}; "
            f"xformers errs by {self.error:.2e}; worst: {self.worst}"
        )


@dataclass
class Watch:
    """Stands around `RocoCudaImpl.forward` and asks xformers too.

    Attributes:
        forward: The method itself.
        opinion: xformers' kernel.
        found: Comparisons by name of layer and phase.
    """

    forward: Callable[..., torch.Tensor]
    opinion: Opinion
    found: dict[tuple[str, str], Comparison] = field(
        default_factory=lambda: defaultdict(Comparison)
    )

    def __call__(
        self,
        impl: Any,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: RocoCudaMetadata,
        output: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        rows = rows_of(attn_metadata, query)
        # before it: the last layer moves pages when it is done
        states = impl.page_shape.states_view(kv_cache)
        theirs = self.opinion(rows, states, impl.scale)
        true = [exact(row, states, impl.scale) for row in rows]
        result = self.forward(
            impl,
            layer,
            query,
            key,
            value,
            kv_cache,
            attn_metadata,
            output,
            *args,
            **kwargs,
        )
        counts = [len(row.query) for row in rows]
        parts = (output[: sum(counts)].split(counts), theirs.split(counts), true)
        for row, our, their, right in zip(rows, *parts, strict=True):
            comparison = self.found[layer.layer_name, row.phase]
            comparison.add(row, our, their, right)
        return result


@pytest.mark.parametrize(
    ("dtype", "kernel", "opinion"),
    [
        ("bfloat16", fmha.triton_splitk.FwOp, split_k),
        ("float16", fmha.triton_splitk.FwOp, split_k),
        ("float32", fmha.cutlass.FwOp, cutlass),
    ],
    ids=["bfloat16-split-k", "float16-split-k", "float32-cutlass"],
)
def test_decodes_and_prompts_before_and_after_evictions(
    dtype: str,
    kernel: Any,
    opinion: Opinion,
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # not at the top: a machine without a GPU collects these tests too
    from vllm_roco.attention.cuda.impl import RocoCudaImpl

    if not kernel.is_available():
        pytest.skip(f"xformers has no {kernel.NAME} on this machine")
    watch = Watch(RocoCudaImpl.forward, opinion)
    with gpu_engine(
        tiny_llama,
        OPTIONS,
        **EAGER,
        dtype=dtype,
        max_model_len=MAX_MODEL_LEN,
        num_gpu_blocks_override=96,
    ) as engine:
        assert engine.kv_caches[0].shape[2] == PAGE
        monkeypatch.setattr(
            RocoCudaImpl, "forward", lambda *args, **kwargs: watch(*args, **kwargs)
        )
        engine.generate(PROMPTS, NUM_NEW)
        layers = list(engine.layers)
    report = [f"{layer}, {phase}: {it}" for (layer, phase), it in watch.found.items()]
    print(f"{dtype}, {kernel.NAME}", *report, sep="\n")
    for kind in ("decode", "prompt"):
        for when in ("before", "after"):
            for layer in layers:
                comparison = watch.found[layer, f"{kind} {when} the first eviction"]
                assert comparison.rows > 0, f"no {kind} {when} an eviction in {layer}"
    wrong = [it for it in watch.found.values() if not it.apart <= it.allowed]
    assert not wrong, "\n".join(report)
