# SPDX-License-Identifier: Apache-2.0
"""What closing a step costs: choosing victims and moving survivors in every layer.

    python -m benchmarks.kernels.eviction --out benchmarks/results

Needs one NVIDIA GPU with 48 GiB and vLLM. A decode step of Llama-3.1-8B's shape (live
table, attention and matrix products of 32 layers, logits) runs as one CUDA graph,
without its end and with it, nothing being due; then the end alone, with no row due, one
row and all rows. `roco/contribution` chooses by statistics and values, `roco/peak` by
statistics alone, `recent` by age.

Writes `eviction.csv` (microseconds, medians; `_low` and `_high` are the 20 % and 80 %
quantiles), and versions into `provenance.json`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from transformers import PreTrainedConfig

from benchmarks.kernels.measuring import (
    Timing,
    captured,
    command,
    interleaved,
    within,
)
from benchmarks.kernels.workload import Shape
from benchmarks.machine import environment
from benchmarks.rows import note, write
from benchmarks.specs import BLOCK_SIZE, layer_specs, shape_of
from vllm_roco import reference
from vllm_roco.attention.cuda.eviction import (
    CudaEviction,
    EvictionScratch,
    EvictionScratchSize,
)
from vllm_roco.attention.cuda.step_buffers import StepBuffers
from vllm_roco.attention.layers import LayerGroup
from vllm_roco.config import RocoConfig
from vllm_roco.kv_cache import page
from vllm_roco.ops.decode.attention import decode_attention
from vllm_roco.ops.device import Device
from vllm_roco.request_options.planner import RequestPlanner

POLICIES: dict[str, dict[str, Any]] = {
    "roco/contribution": {"shield": "contribution", "shield_ratio": 1.0},
    "roco/peak": {"shield": "peak", "shield_ratio": 0.7},
    "recent": {"policy": "recent"},
}
DTYPE = torch.bfloat16
CLOSES = 50
"""Ends of a step in one graph: each is too short to be timed alone."""
SAMPLES = 30
QUEUE_CYCLES = 1_000_000
"""Of the GPU's clock, about half a millisecond."""


class Caches(list[torch.Tensor]):
    """What the end of a step asks of vLLM's layers: caches as vLLM binds them."""

    def kv_caches(self) -> list[torch.Tensor]:
        """Return them."""
        return self


class Step:
    """One decode step of a batch that has been evicting for a while.

    Args:
        model: The model's shape.
        rows: Sequences, one query each.
        config: RoCo's options.
        device: Where it runs.
    """

    def __init__(
        self,
        model: PreTrainedConfig,
        rows: int,
        config: RocoConfig,
        device: torch.device,
    ) -> None:
        _, spec = layer_specs(model, config)
        self.model = model
        self.rows = rows
        self.device = device
        self.measures = config.measures
        self.schedule = spec.schedule
        self.evicted = 4 * self.schedule.stride_blocks
        resident = self.schedule.budget_blocks
        live = resident + self.schedule.stride_blocks + 1
        self.caches = [
            reference.paged_cache(
                num_blocks=1 + rows * live,
                num_kv_heads=model.num_key_value_heads,
                block_size=BLOCK_SIZE,
                head_size=model.head_dim,
                dtype=DTYPE,
                device=device,
            )
            for _ in range(model.num_hidden_layers)
        ]
        for cache in self.caches:
            page.page_view(cache).normal_()
        # pages in random order; page 0 is vLLM's null block
        blocks = 1 + torch.randperm(rows * live, device=device).view(rows, live)
        self.block_table = torch.zeros(
            rows, self.evicted + live, dtype=torch.int32, device=device
        )
        self.block_table[:, :resident] = blocks[:, :resident]
        self.block_table[:, resident + self.evicted :] = blocks[:, resident:]
        # the resident holds what it held from the start: any distinct positions will do
        position = torch.arange(live, device=device)
        position[resident:] += self.evicted
        self.statistics = torch.rand(
            1 + rows * live, model.num_key_value_heads, page.NUM_FIELDS, device=device
        )
        # page 0 is nobody's
        first = torch.zeros(1 + rows * live, device=device)
        first[blocks] = (BLOCK_SIZE * position).float().expand(rows, -1)
        self.first_positions = first
        end = BLOCK_SIZE * (live + self.evicted)
        self.statistics[..., page.NUM_QUERIES] = (end - first)[:, None]
        self.seq_lens = torch.zeros(rows, dtype=torch.int32, device=device)
        self.query_starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self.buffers = StepBuffers.allocate(rows, live, device)
        row = RequestPlanner(config, BLOCK_SIZE).plan(None, 1).row
        self.buffers.eviction_rows.copy_(torch.tensor(row, dtype=torch.int32))
        size = EvictionScratchSize.of(
            rows=rows,
            live_blocks=live,
            resident_blocks=resident,
            num_layers=model.num_hidden_layers,
            measure=config.measures,
        )
        self.scratch = EvictionScratch.over(
            torch.empty(size.total, device=device), size
        )
        bound = Caches(page.page_view(cache)[:, None, None] for cache in self.caches)
        self.eviction = CudaEviction(cast(LayerGroup, bound), spec, self.scratch)
        self.restore()
        self.set_due(0)

    def restore(self) -> None:
        """Give every page the statistics that it had before it was moved over."""
        for cache in self.caches:
            page.statistics_view(cache).copy_(self.statistics)
            page.first_positions_view(cache).copy_(self.first_positions)

    def set_due(self, rows: int) -> None:
        """Let the step end a stride in the first rows, and amid one in the others."""
        blocks = self.schedule.budget_blocks + self.evicted
        stride = self.schedule.stride
        self.seq_lens.fill_(blocks * BLOCK_SIZE + stride // 2)
        self.seq_lens[:rows] = blocks * BLOCK_SIZE + stride
        self.look()

    def look(self) -> None:
        """Build the live table, as every step does first."""
        self.buffers.fill(
            self.block_table, self.seq_lens, self.query_starts, BLOCK_SIZE
        )

    def close(self) -> None:
        """Choose and move, as the last layer does."""
        self.eviction.evict(self.buffers, self.seq_lens)

    @property
    def num_moves(self) -> int:
        """Blocks that the last `close` moved in each layer."""
        return int(self.scratch.num_moves.sum())

    def model_step(self, device: Device) -> Callable[[], None]:
        """Return the step without its end: attention and matrix products.

        Args:
            device: What the attention kernel is fitted to.
        """
        model, rows = self.model, self.rows
        q_heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
        size, width = model.head_dim, model.hidden_size
        inner_width = model.intermediate_size
        longest = self.schedule.max_live_tokens() + 1
        shape = Shape(rows, longest, q_heads, kv_heads, size)
        plan = shape.plan(device)
        splits = shape.splits(plan, self.device)
        scratch = shape.scratch(
            plan, self.device, block_size=BLOCK_SIZE, measure=self.measures
        )

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, dtype=DTYPE, device=self.device)

        heads = q_heads + 2 * kv_heads
        layers = [
            (
                random(width, heads * size),
                random(q_heads * size, width),
                random(width, 2 * inner_width),
                random(inner_width, width),
                cache,
                page.statistics_view(cache) if self.measures else None,
            )
            for cache in self.caches
        ]
        logits = random(width, model.vocab_size)
        hidden, inner = random(rows, width), random(rows, inner_width)
        output = random(rows, q_heads, size)

        def step() -> None:
            self.look()
            splits.deal(self.buffers.live_lens, plan)
            for qkv, projection, gate_up, down, cache, statistics in layers:
                query = (hidden @ qkv).view(rows, heads, size)
                decode_attention(
                    query=query[:, :q_heads],
                    kv_cache=cache,
                    live_table=self.buffers.live_table,
                    live_lens=self.buffers.live_lens,
                    splits=splits,
                    measured_lens=self.buffers.measured_lens,
                    evicted_before=self.buffers.evicted_before,
                    statistics=statistics,
                    output=output,
                    scratch=scratch,
                    plan=plan,
                    scale=size**-0.5,
                )
                output.view(rows, -1) @ projection
                hidden @ gate_up
                inner @ down
            hidden @ logits

        return step


def time_close(step: Step, due: int) -> Timing:
    """Time the end of a step in which so many rows are due, for which it restores."""
    step.set_due(due)
    graph = captured([step.close])
    events = []
    for _ in range(SAMPLES):
        step.restore()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # the launch itself takes longer than some ends of a step: it waits in the queue
        torch.cuda._sleep(QUEUE_CYCLES)
        start.record()
        graph.replay()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return Timing.of([1e3 * start.elapsed_time(end) for start, end in events])


def measure(
    model: PreTrainedConfig, batch: int, config: RocoConfig, name: str
) -> dict[str, object]:
    """Return one policy's row of the table."""
    device = torch.device("cuda")
    step = Step(model, batch, config, device)
    body = step.model_step(Device.of(device))

    def whole() -> None:
        body()
        step.close()

    together = interleaved(
        {"step": [body], "step_closed": [whole]}, rounds=6, milliseconds=250
    )
    alone = interleaved({"close": [step.close] * CLOSES}, rounds=3, milliseconds=50)
    timings = {
        **together,
        "close_nothing_due": alone["close"],
        "close_1_due": time_close(step, 1),
        f"close_{batch}_due": time_close(step, batch),
    }
    row: dict[str, object] = {
        "policy": name,
        "layers": model.num_hidden_layers,
        "kv_heads": model.num_key_value_heads,
        "head_size": model.head_dim,
        "rows": batch,
        "budget": config.budget,
        "stride": config.stride,
        "moved_blocks": step.num_moves,
    }
    for name, timing in timings.items():
        row |= timing.columns(name)
    ordinary = timings["step"].median
    row["nothing_due_share"] = round(timings["close_nothing_due"].median / ordinary, 5)
    row["all_due_steps"] = round(timings[f"close_{batch}_due"].median / ordinary, 3)
    return row


def main() -> None:
    """Run the command line."""
    parser = command(__doc__, time_limit=math.inf)
    parser.add_argument("--rows", type=int, default=64, help="sequences of the batch")
    parser.add_argument("--budget", type=int, default=RocoConfig.budget)
    parser.add_argument("--stride", type=int, default=RocoConfig().stride)
    arguments = parser.parse_args()

    model = shape_of("llama-3.1-8b")
    facts = environment()
    note(arguments.out, "eviction", facts)
    measured = []
    for name in within(arguments.time_limit, POLICIES):
        config = RocoConfig(
            **POLICIES[name], budget=arguments.budget, stride=arguments.stride
        )
        machine = {key: facts[key] for key in ("gpu", "vllm", "commit")}
        measured.append({**machine, **measure(model, arguments.rows, config, name)})
        print(json.dumps(measured[-1], indent=1), flush=True)
        torch.cuda.empty_cache()
        write(arguments.out / "eviction.csv", measured)


if __name__ == "__main__":
    main()
