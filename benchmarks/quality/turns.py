# SPDX-License-Identifier: Apache-2.0
"""What it costs in answers to read conversations turn by turn.

    python -m benchmarks.quality.turns --out DIR

The same conversations are read by the plugin as it does by default, with answers that
are read like everything else, with chunks that do not end with turns either, with
shorter ones of these, and by the full cache. Each has a needle in prose that is told in
turns, by the user or by the assistant, and asks for it in the last one.

Appends to `turns.csv` (`right` of `n` numbers found, Wilson's interval of their share;
`context` is the length of the prose, `turn_end_token_ids` is `model` for the tokens
with which the model ends its answers, `none` for no such token, `answers` tells whether
they are read `as written`), and versions to `provenance.json`. What is there is not
measured again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks import machine, rows
from benchmarks.quality.grid import DEFAULT, FULL, setup_of
from benchmarks.quality.significance import score
from benchmarks.quality.tables import turns
from benchmarks.quality.tasks import Problem
from benchmarks.quality.tasks.told_in_turns import (
    ANSWER_START,
    TELLERS,
    build_told_in_turns,
)
from benchmarks.quality.training.trained import find_any
from benchmarks.rows import Row, Table
from tools.packaged_models import SMOLLM2
from vllm_roco.config import RocoConfig

TASK = "needle, told in turns"
CONTEXTS = (2048, 4096)
BUDGETS = (512, 1024)
SHORT_CHUNK = 256
TEXTS, SEED = 200, 7000
TABLE = Table(
    "turns",
    key=[
        *(
            "task",
            "model",
            "context",
            "budget",
            "stride",
            "chunk",
            "turn_end_token_ids",
        ),
        *("answers", "teller"),
        *("n", "seed", "gpu", "vllm", "commit"),
    ],
    results=["right", "score", "ci_low", "ci_high"],
)
_MOST_AROUND = 2048
"""Room for what stands around the prose, and for the answer: tokens."""
_KV_CACHE_BYTES = 8 * 2**30
_DIGITS = 4


@dataclass(frozen=True)
class Side:
    """How the conversations are read.

    Attributes:
        budget: Tokens kept, 0 for the full cache.
        stride: Tokens evicted at a time.
        chunk: Most tokens of a chunk.
        turn_end_token_ids: `model` or `none`; empty for the full cache.
        answers: `as written` or `read again`; likewise.
    """

    budget: int = 0
    stride: int = 0
    chunk: int = 0
    turn_end_token_ids: str = ""
    answers: str = ""

    def engine_arguments(
        self, context: int, answer_start: Sequence[int]
    ) -> dict[str, Any]:
        """Return the arguments of `LLM` beside the model.

        Args:
            context: Most tokens of the prose.
            answer_start: Tokens behind which an answer begins.
        """
        # it imports vLLM
        from benchmarks.quality.with_vllm import engine_arguments

        setup = FULL
        if self.budget:
            setup = setup_of(DEFAULT, self.budget, self.stride, self.chunk)
        arguments = engine_arguments(setup, context + _MOST_AROUND)
        if "kv_cache_memory_bytes" in arguments:
            arguments["kv_cache_memory_bytes"] = _KV_CACHE_BYTES
        if self.budget:
            options = arguments["additional_config"]["roco"]
            is_written = self.answers == "as written"
            options["answer_start_token_ids"] = [*answer_start] if is_written else []
            if self.turn_end_token_ids == "none":
                options["turn_end_token_ids"] = []
        return arguments


def sides(budgets: Sequence[int]) -> Iterator[tuple[Side, Sequence[str]]]:
    """Yield what is compared, and who tells the prose of it.

    The full cache, then each budget's sides. What answers cost as they were written,
    and what is told by the assistant, is asked at the smallest budget alone.
    """
    yield Side(), TELLERS
    for budget in budgets:
        usual = RocoConfig(budget=budget)
        sizes = budget, usual.stride, usual.chunk
        tellers = TELLERS if budget == min(budgets) else TELLERS[:1]
        if budget == min(budgets):
            yield Side(*sizes, "model", "as written"), tellers
        yield Side(*sizes, "model", "read again"), tellers
        yield Side(*sizes, "none", "read again"), tellers
        if usual.chunk > SHORT_CHUNK:
            short = Side(budget, usual.stride, SHORT_CHUNK, "none", "read again")
            yield short, TELLERS[:1]


def counted(right: int, n: int) -> Row:
    """Return what a row says of a side's answers.

    Args:
        right: Answers that name the number.
        n: All answers.
    """
    share, low, high = score("accuracy", (1.0,) * right + (0.0,) * (n - right))
    names = {"score": share, "ci_low": low, "ci_high": high}
    return {"right": right} | {key: round(names[key], _DIGITS) for key in names}


def answers_right(llm: Any, problems: Sequence[Problem]) -> int:
    """Return how many of the conversations are answered with their number.

    Args:
        llm: vLLM's `LLM`.
        problems: What is asked.
    """
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    outputs = llm.generate(
        [TokensPrompt(prompt_token_ids=problem.token_ids) for problem in problems],
        [
            SamplingParams(temperature=0, max_tokens=problem.max_tokens)
            for problem in problems
        ],
        use_tqdm=False,
    )
    return sum(
        problem.score(output.outputs[0].text) == 1
        for problem, output in zip(problems, outputs, strict=True)
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.turns",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR")
    add("--model", default=SMOLLM2, help="or a Hugging Face folder; of ChatML")
    add("--n", type=int, default=TEXTS, help="conversations a cell")
    add("--seed", type=int, default=SEED)
    add("--contexts", type=int, nargs="+", default=CONTEXTS, metavar="TOKENS")
    add("--budgets", type=int, nargs="+", default=BUDGETS, metavar="TOKENS")
    add("--commit", help="to be named in the table; default: git's")
    arguments = parser.parse_args()
    run(arguments)
    print(turns(TABLE.read(arguments.out)))


def run(arguments: argparse.Namespace) -> None:
    """Measure what the folder lacks, with one engine for each side."""
    from vllm import LLM

    folder: Path = arguments.out
    model = find_any(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    facts = machine.environment_elsewhere()
    facts["commit"] = arguments.commit or facts["commit"]
    asked: dict[tuple[str, int], list[Problem]] = {
        (teller, context): build_told_in_turns(
            tokenizer, context, arguments.n, arguments.seed, teller
        )
        for teller in TELLERS
        for context in arguments.contexts
    }
    start = tokenizer(ANSWER_START, add_special_tokens=False)["input_ids"]
    common = {
        "task": TASK,
        # folders of packaged models have names of their own
        "model": Path(arguments.model).name,
        **{"n": arguments.n, "seed": arguments.seed},
        **{name: facts[name] for name in ("gpu", "vllm", "commit")},
    }
    # before a run that may be cut short
    rows.note(
        folder, TABLE.name, {**facts, **{key: common[key] for key in ("model", "seed")}}
    )
    for side, tellers in sides(arguments.budgets):
        row = {**common, **vars(side)}
        lacking = [
            (cell, problems)
            for (teller, context), problems in asked.items()
            if teller in tellers
            and not TABLE.has(
                folder, cell := {"teller": teller, "context": context, **row}
            )
        ]
        if not lacking:
            continue
        llm = LLM(model, **side.engine_arguments(max(arguments.contexts), start))
        for cell, problems in lacking:
            found = {**cell, **counted(answers_right(llm, problems), arguments.n)}
            TABLE.append(folder, found)
            print(found, flush=True)
        llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
