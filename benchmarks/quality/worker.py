# SPDX-License-Identifier: Apache-2.0
"""One process of a run: reads a job from a file and appends what comes of it.

    python -m benchmarks.quality.worker JOB.json

`benchmarks.quality` starts it; by hand it repeats what failed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.machine import device_name
from benchmarks.quality.cells import (
    GENERATION,
    PERPLEXITY,
    PERPLEXITY_GENERATION,
    PROMPT_OF_GENERATION,
    QUESTION_METRIC,
    Cell,
    Engine,
)
from benchmarks.quality.judge import judge
from benchmarks.quality.results import Metrics, Result, append
from benchmarks.quality.tasks import Problem, build, prose


def measure(engine: Engine, tokenizer: Any, model: str, cell: Cell) -> Metrics:
    """Return what a cell comes to, one number a problem or text.

    Args:
        engine: Runs the model as the cell's setup says.
        tokenizer: The model's.
        model: Hugging Face folder, for the judge of what is generated.
        cell: What is measured.
    """
    if cell.task in (PERPLEXITY, PERPLEXITY_GENERATION):
        passages = prose(tokenizer, cell.context, cell.n, cell.seed)
        losses = engine.losses(cell, passages, cell.context // 2)
        return {"perplexity": [sum(passage) / len(passage) for passage in losses]}
    if cell.task == GENERATION:
        prompts = prose(tokenizer, PROMPT_OF_GENERATION, cell.n, cell.seed)
        length = cell.context - PROMPT_OF_GENERATION
        written = engine.answers(cell, prompts, length, to_the_end=True)
        return judge(model, prompts, written)
    problems = _problems(cell.task, tokenizer, cell.context, cell.n, cell.seed)
    asked = [problem.questions for problem in problems]
    answers = engine.converse(cell, asked)
    return accuracies(
        [
            [
                question.score(tokenizer.decode(answer, skip_special_tokens=True))
                for question, answer in zip(questions, said, strict=True)
                if question.answers
            ]
            for questions, said in zip(asked, answers, strict=True)
        ]
    )


@cache
def _problems(*arguments: Any) -> list[Problem]:
    """Return what `build` does, once for all methods."""
    return build(*arguments)


def accuracies(scores: list[list[float]]) -> Metrics:
    """Return each problem's mean score, and where there are several each question's.

    Args:
        scores: Of each question of each problem.
    """
    metrics = {"accuracy": [sum(each) / len(each) for each in scores]}
    columns = list(zip(*scores, strict=True))
    if len(columns) > 1:
        for number, column in enumerate(columns, 1):
            metrics[f"{QUESTION_METRIC}{number}"] = list(column)
    return metrics


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("job", type=Path)
    job = json.loads(parser.parse_args().job.read_text())

    cells = [Cell.from_json(fields) for fields in job["cells"]]
    # vLLM and torch are imported by the one that is needed
    name = f"benchmarks.quality.with_{cells[0].setup.engine}"
    engine: Engine = importlib.import_module(name).Engine(job["model"], cells)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    try:
        for cell in cells:
            begin = time.monotonic()
            metrics = measure(engine, tokenizer, job["model"], cell)
            seconds = round(time.monotonic() - begin, 2)
            result = Result(cell, metrics, device_name(), job["commit"], seconds)
            append(Path(job["results"]), result)
    finally:
        engine.close()


if __name__ == "__main__":
    main()
