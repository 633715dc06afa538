# SPDX-License-Identifier: Apache-2.0
"""What a model in training solves, with its full cache.

While it is trained, it is judged in one pass: an answer counts as far as its tokens are
the likeliest behind the right ones, which is what greedy generation would write. That
takes problems of the report's words and novel, which no training sees, and of a seed
that no report uses. At the end it answers RULER's problems, scored as ever.
"""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.quality.tasks import HARD_TASKS, build
from benchmarks.quality.tasks.conversation import CONVERSATIONS
from benchmarks.quality.tasks.derivation import prompt_tokens, write_derivation
from benchmarks.quality.tasks.exchange import Exchange, fitted
from benchmarks.quality.tasks.material import report_material

SEED = 90_000
CONTEXTS = (2048, 4096)
TASKS = (
    *("needle, 4 questions", "multikey, 4 questions", "multivalue, 4 questions"),
    *("multikey, later", "variables", "common_words", "derivation"),
)
"""Judged in one pass."""

_BATCH_TOKENS = 64 * 1024
_MOST_ANSWER_TOKENS = 80
"""Ten words and their numbers; adapters end their answers by themselves."""
_SHORT_ANSWER = 16
"""Tokens up to which an answer is right or wrong; longer ones count by their tokens."""


@dataclass(frozen=True)
class Marked:
    """A conversation with the right answers.

    Attributes:
        token_ids: All of it.
        answers: Where they stand, what is only to be written not among them.
    """

    token_ids: list[int]
    answers: tuple[range, ...]


Paper = dict[str, list[Marked]]
"""Problems by task and context."""


def write_paper(
    tokenizer: Any, n: int, contexts: tuple[int, ...], processes: int
) -> Paper:
    """Return `n` problems of each task and context.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
        n: Of each kind.
        contexts: Most tokens of a prompt.
        processes: That write them; no thread may have used a GPU before.
    """
    kinds = [(task, context) for context in contexts for task in TASKS]
    wanted = [(task, context, i) for task, context in kinds for i in range(n)]
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        found = pool.starmap(partial(_write, tokenizer), wanted)
    return {
        f"{task} {context}": found[i * n : (i + 1) * n]
        for i, (task, context) in enumerate(kinds)
    }


@torch.inference_mode()
def judge(model: Any, paper: Paper) -> dict[str, float]:
    """Return the mean score of each kind of problem."""
    return {
        name: round(sum(expected(model, each) for each in marked) / len(marked), 4)
        for name, marked in paper.items()
    }


@torch.inference_mode()
def answer_ruler(
    model: Any, tokenizer: Any, n: int, contexts: tuple[int, ...] = CONTEXTS
) -> dict[str, float]:
    """Return the mean score of RULER's hard tasks at each context.

    Args:
        model: Hugging Face decoder.
        tokenizer: Its own.
        n: Problems of each kind.
        contexts: Of those that there are problems of.
    """
    scores = {}
    for context in contexts:
        for task in HARD_TASKS:
            problems = build(task, tokenizer, context, n, SEED)
            prompts = [problem.token_ids for problem in problems]
            most = min(problems[0].max_tokens, _MOST_ANSWER_TOKENS)
            texts = tokenizer.batch_decode(
                answers(model, prompts, most, tokenizer.eos_token_id),
                skip_special_tokens=True,
            )
            pairs = zip(problems, texts, strict=True)
            scores[f"{task} {context}"] = round(
                sum(p.score(t) for p, t in pairs) / n, 4
            )
    return scores


@torch.inference_mode()
def answers(
    model: Any, prompts: list[list[int]], most: int, end: int
) -> list[list[int]]:
    """Return greedy answers.

    Args:
        model: Hugging Face decoder.
        prompts: Token ids.
        most: Most tokens of an answer.
        end: Token that ends one, and fills rows.
    """
    found: list[list[int]] = []
    longest = max(map(len, prompts))
    size = max(1, _BATCH_TOKENS // longest)
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        width = max(map(len, batch))
        ids = torch.tensor([[end] * (width - len(row)) + row for row in batch])
        real = torch.tensor(
            [[0] * (width - len(row)) + [1] * len(row) for row in batch]
        )
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=real.to(model.device),
            max_new_tokens=most,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end,
        )
        found += output[:, width:].tolist()
    return found


@torch.inference_mode()
def expected(model: Any, marked: Marked) -> float:
    """Return the share of the answers that a model expects."""
    tokens = torch.tensor([marked.token_ids], device=model.device)
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state[0]
    shares = []
    for span in marked.answers:
        logits = model.lm_head(hidden[span.start - 1 : span.stop - 1])
        right = logits.argmax(-1) == tokens[0, span.start : span.stop]
        share = right.all() if len(span) <= _SHORT_ANSWER else right
        shares.append(float(share.float().mean()))
    return sum(shares) / len(shares)


def mark(exchanges: list[Exchange], tokenizer: Any) -> Marked:
    """Return a conversation's tokens."""
    ids: list[int] = []
    spans: list[range] = []
    end = [tokenizer.eos_token_id]
    for exchange in exchanges:
        ids += tokenizer(exchange.ask, add_special_tokens=not ids)["input_ids"]
        start = len(ids)
        ids += tokenizer(exchange.reply, add_special_tokens=False)["input_ids"]
        if exchange.answers:
            spans.append(range(start, len(ids)))
        ids += end
    return Marked(ids, tuple(spans))


def _write(tokenizer: Any, task: str, context: int, index: int) -> Marked:
    form = CONVERSATIONS.get(task)
    exchanges = fitted(
        form.write if form else lambda writer: write_derivation(writer),
        f"{task} {SEED} {index}",
        report_material(),
        tokenizer,
        context if form else prompt_tokens(context),
    )
    return mark(exchanges, tokenizer)
