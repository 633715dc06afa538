# SPDX-License-Identifier: Apache-2.0
"""What options of requests cost a decode step, where they change nothing that it does.

One engine serves the same batch over and over, its sides in turns: with no options,
with the same ones in each request, and with other ones in each. All sides read and
evict as many blocks, so a difference is what it costs to bring the rows to the device
and to read them there. Times are the engine core's own, from one step's tokens to the
next one's.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from vllm import LLM, SamplingParams
from vllm.benchmarks import throughput
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import RequestOutputKind

from benchmarks.kernels.measuring import Timing
from benchmarks.rows import Table
from benchmarks.serving.engines import Engine, Requests
from benchmarks.serving.jobs import Job
from benchmarks.serving.vllm_bench import parsed
from benchmarks.specs import BLOCK_SIZE
from vllm_roco.config import NAMESPACE, RocoConfig

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput

Options = Mapping[str, object]

MOST_REQUESTS = 256
SERVER = RocoConfig(budget=256, stride=64, max_budget=256 + MOST_REQUESTS * BLOCK_SIZE)
SIDES = ("none", "equal", "different")
"""Options of the requests of a batch; a ratio is over `equal`."""
NUM_STEPS = 2 * SERVER.stride
"""That are timed: in so many, every request evicts as often as any other."""
MARGIN = 96
"""Steps in which only a part of the requests runs: the first arrive before the last."""


@dataclass(frozen=True)
class Case:
    """A batch, and what its requests may ask for that leaves all steps alike.

    Attributes:
        name: In the table.
        input_len: Tokens of each prompt.
        options: Of the request of a number, when all are different.
    """

    name: str
    input_len: int
    options: Callable[[int], Options]

    def options_of(self, side: str, count: int) -> list[Options]:
        """Return what each request brings.

        Args:
            side: One of `SIDES`.
            count: How many requests there are.
        """
        if side == "none":
            return [{}] * count
        numbers = range(count) if side == "different" else [0] * count
        return [self.options(number) for number in numbers]


def below_the_budget(number: int) -> Options:
    """Return options of which all are different, and a budget that is not reached."""
    return {
        "budget": SERVER.budget + BLOCK_SIZE * (number + 1),
        "stride": BLOCK_SIZE * (1 + number % 4),
        "chunk": BLOCK_SIZE * (1 + number % 16),
        "shield": ("deviation", "peak")[number % 2],
        **beside_the_budget(number),
    }


def beside_the_budget(number: int) -> Options:
    """Return options of which other blocks are kept, as many and as often."""
    return {
        "sink": number % 16 + 1,
        "recent": number // 16 + 33,
        "shield_ratio": (number % 64 + 48) / 128,
    }


CASES = (
    Case("nothing is evicted", 64, below_the_budget),
    # read, and evicted from once, when the first token is written
    Case("each stride is evicted", SERVER.budget + SERVER.stride, beside_the_budget),
)
TABLE = Table(
    "request_options",
    key=(
        *("model", "case", "options"),
        *("budget", "stride", "num_requests", "input_len", "num_steps"),
    ),
    # medians over the rounds, and their 20 % and 80 % quantiles
    results=(
        *("rounds", "step_us", "step_low", "step_high"),
        *("ratio", "ratio_low", "ratio_high"),
    ),
)


def jobs(model: str, count: int, num_rounds: int, common: Sequence[str]) -> list[Job]:
    """Return every side of every case, which one engine serves.

    Args:
        model: Folder of `benchmarks/models`.
        count: Requests of each batch, at most `MOST_REQUESTS`.
        num_rounds: How often each side has its turn.
        common: What the engine is told.
    """
    batches = tuple(
        Requests(count, case.input_len, NUM_STEPS + MARGIN) for case in CASES
    )
    engine = Engine(model=model, batches=batches, roco=SERVER)

    @cache
    def measured(case: Case) -> Mapping[str, Mapping[str, object]]:
        command = [*engine.command(common), "--async-scheduling"]
        settings = EngineArgs.from_cli_args(parsed(throughput, command))
        return summary(rounds(LLM.from_engine_args(settings), case, count, num_rounds))

    def measure(case: Case, side: str) -> Mapping[str, object]:
        return measured(case)[side]

    return [
        [
            (columns(engine, case, side, count), partial(measure, case, side))
            for case in CASES
            for side in SIDES
        ]
    ]


def columns(engine: Engine, case: Case, side: str, count: int) -> dict[str, object]:
    """Return the columns of `request_options.csv` that tell a side from others."""
    return {
        "model": engine.model,
        "case": case.name,
        "options": side,
        "budget": SERVER.budget,
        "stride": SERVER.stride,
        "num_requests": count,
        "input_len": case.input_len,
        "num_steps": NUM_STEPS,
    }


def rounds(llm: LLM, case: Case, count: int, num_rounds: int) -> list[dict[str, float]]:
    """Return each round's microseconds a step, by side.

    Every round begins with another side. Before the first one each side is served once
    and not timed.

    Args:
        llm: An engine of `SERVER`'s options.
        case: What is served.
        count: Requests of a batch.
        num_rounds: How often each side has its turn.
    """
    found: list[dict[str, float]] = []
    for number in range(num_rounds + 1):
        first = number % len(SIDES)
        order = (*SIDES[first:], *SIDES[:first])
        found.append({side: step_us(llm, case, side, count) for side in order})
    return found[1:]


def summary(rounds: Sequence[Mapping[str, float]]) -> dict[str, dict[str, object]]:
    """Return the columns that are measured, by side.

    Args:
        rounds: Microseconds a step of each round, by side.
    """
    found: dict[str, dict[str, object]] = {}
    for side in SIDES:
        # of one round: a drift of the clock meets both alike
        ratios = Timing.of([times[side] / times["equal"] for times in rounds])
        found[side] = {
            "rounds": len(rounds),
            **Timing.of([times[side] for times in rounds]).columns("step"),
            "ratio": ratios.median,
            **{"ratio_low": ratios.low, "ratio_high": ratios.high},
        }
    return found


def step_us(llm: LLM, case: Case, side: str, count: int) -> float:
    """Serve a batch; return the mean microseconds of a step that decodes all of it.

    Args:
        llm: An engine of `SERVER`'s options.
        case: What is served.
        side: One of `SIDES`.
        count: Requests of the batch.

    Raises:
        RuntimeError: They did not run together for `NUM_STEPS` steps.
    """
    draw = random.Random(0)
    engine = llm.llm_engine
    for number, options in enumerate(case.options_of(side, count)):
        engine.add_request(
            str(number),
            {"prompt_token_ids": draw.choices(range(1, 256), k=case.input_len)},
            _params(options),
        )
    ends: list[float] = []
    while engine.has_unfinished_requests():
        outputs: Any = engine.step()
        if len(outputs) == count:
            ends.append(_end(outputs))
    if len(ends) <= NUM_STEPS:
        raise RuntimeError(
            f"{case.name}, options {side}: {count} requests ran together for "
            f"{len(ends)} steps, and {NUM_STEPS + 1} are needed. Raise "
            "--max-num-batched-tokens, so that all prompts are read in fewer."
        )
    return 1e6 * (ends[NUM_STEPS] - ends[0]) / NUM_STEPS


def _params(options: Options) -> SamplingParams:
    return SamplingParams(
        temperature=0,
        max_tokens=NUM_STEPS + MARGIN,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args={NAMESPACE: dict(options)} if options else None,
    )


def _end(outputs: Sequence[RequestOutput]) -> float:
    """Return when the engine core was done with a step, in seconds of its clock."""
    metrics: Any = outputs[0].metrics
    return float(metrics.last_token_ts)
