# SPDX-License-Identifier: Apache-2.0
"""The tables of quality, as docs/quality.md and README.md show them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd

from benchmarks import rows
from benchmarks.markdown import UNMEASURED, grid, lines, table, texts
from benchmarks.quality.cells import (
    GENERATION,
    PERPLEXITY,
    PERPLEXITY_GENERATION,
    QUESTION_METRIC,
)
from benchmarks.quality.grid import LEAST_FULL_ACCURACY, PEAK
from benchmarks.quality.policies import BASE, BASELINES
from benchmarks.quality.presets import PRESETS
from benchmarks.quality.scores import Scores, kind_of_pace, label_of, named, with_mean
from benchmarks.rows import matching

_SCORE = "{score:.2f} [{ci_low:.2f}, {ci_high:.2f}]"
_OF_FULL = "{of_full:.2f} [{of_full_low:.2f}, {of_full_high:.2f}]"
_LOSS = "{of_full:.3f} [{of_full_low:.3f}, {of_full_high:.3f}]"
_SIGNIFICANT = 0.05
_MOST_CHANGES = 12
"""Of a search, shown beside its baselines."""
_VERDICTS = (
    (0.95, "safe on these tasks"),
    (0.8, "measure your own task first"),
    (0.5, "loses much on some of these tasks"),
    (0.0, "broken: do not serve"),
)
"""Least share of the full cache's accuracy, on the worst task."""


def tables(results: Path) -> dict[str, str]:
    """Return Markdown by name, also for what has no rows.

    Args:
        results: Folder of the CSV files.
    """
    found = {f"quality_{name}": UNMEASURED for name in (*_PARTS, *_OTHERS, *_OWN)}
    if scores := Scores.read(results):
        found |= {f"quality_{name}": part(scores) for name, part in _PARTS.items()}
    for name, shown in (_OTHERS | _OWN).items():
        if not (measured := rows.read(results / f"{name}.csv")).empty:
            known = measured if name in _OWN else named(measured)
            found[f"quality_{name}"] = shown(known)
    return found


def _source(scores: Scores) -> str:
    frame = scores.frame.sort_index()

    def each(name: str) -> str:
        return ", ".join(map(str, frame[name].unique()))

    return (
        f"Model {each('model')} on {each('gpu')}, commit {each('commit')}, seed "
        f"{each('seed')}; {len(frame)} rows."
    )


def _headline(scores: Scores) -> str:
    """Return a small table for a front page: every method at a quarter."""
    found = scores.at_budgets("accuracy")
    found = found[found["task"].isin(["passkey", "needle"])]
    quarter = found[found["budget_ratio"] == 0.25]
    full = matching(found, method="full")
    shown = pd.concat([full[full["tasks"].isin(quarter["tasks"])], quarter])
    return grid(shown, {"kept": "{label}"}, "{problems}", _SCORE)


def _choice(scores: Scores) -> str:
    """Return what the default comes to at every share of the context."""
    found = matching(scores.at_budgets("accuracy"), method=scores.default)
    choices = []
    for _, group in found.dropna(subset="of_full").groupby(-found["budget_ratio"]):
        worst = group.sort_values("of_full", kind="stable").head(1)
        choices.append(
            {
                "budget / context": group["share"].iloc[0],
                "measured": ", ".join(group["problems"]),
                "of the full cache, mean": f"{group['of_full'].mean():.2f}",
                "worst task": texts(worst, f"{_OF_FULL} ({{problems}})")[0],
                "verdict": worst["of_full"].iloc[0],
            }
        )
    found = pd.DataFrame(choices)
    return table(found.assign(verdict=verdicts(found["verdict"])))


def verdicts(worst: pd.Series) -> list[str]:
    """Return in words what shares of the full cache mean, on the worst task each.

    Less is no safer than more, whatever was measured at it.

    Args:
        worst: The largest budget first.
    """
    return [
        next(text for most, text in _VERDICTS if least >= most)
        for least in worst.cummin()
    ]


def _accuracy(scores: Scores) -> str:
    title = f"**{{problems}}**, n = {{n}}, full cache {_SCORE}"
    return _by_budget(scores.at_budgets("accuracy"), title, _SCORE)


def _perplexity(scores: Scores) -> str:
    names = {
        PERPLEXITY: "Read as a prompt",
        PERPLEXITY_GENERATION: "As if generated",
    }
    found = scores.at_budgets("perplexity")
    found = found.assign(name=found["task"].map(names)).dropna(subset="name")
    title = f"**{{name}}**, {{context:,}} tokens, n = {{n}}, full cache {_SCORE}"
    return _by_budget(found, f"{title}; perplexity over the full cache's", _LOSS)


def _by_budget(found: pd.DataFrame, title: str, cell: str) -> str:
    """Return a table of methods and budgets for each task, below the full cache's."""
    parts = []
    for _, group in found.groupby("tasks"):
        full, swept = group.iloc[:1], group.iloc[1:]
        order = swept.sort_values("budget_ratio", ascending=False)["share"].unique()
        (caption,) = texts(full, title)
        keys = {"method": "{label}"}
        parts.append(grid(swept, keys, "{share}", cell, caption, order))
    return "\n\n".join(parts)


def _unsolved(scores: Scores) -> str:
    full = matching(scores.frame, method="full", metric="accuracy")
    unsolved = full[full["score"] < LEAST_FULL_ACCURACY]
    if unsolved.empty:
        return f"None: the full cache reaches {LEAST_FULL_ACCURACY} everywhere."
    return lines(unsolved, {"task": "{problems}", "full cache": _SCORE, "n": "{n}"})


def _generation(scores: Scores) -> str:
    titles = {
        "agreement": "tokens the full cache would choose too",
        "divergence": "tokens to the first other one",
        "perplexity": "perplexity under the full cache",
    }
    found = matching(scores.frame.sort_index(), task=GENERATION)
    found["title"] = found["metric"].map(titles)
    found["kept"] = found["share"].mask(found["method"] == "full", " ")
    whole = pd.Series(texts(found, _SCORE.replace(".2f", ".0f")), found.index)
    cells = pd.Series(texts(found, _SCORE), found.index)
    found["cell"] = cells.mask(found["metric"] == "divergence", whole)
    keys = {"method": "{method}", "budget / text": "{kept}", "n": "{n}"}
    return grid(found, keys, "{title}", "{cell}")


def _strides(scores: Scores, *, former: bool = False) -> str:
    """Return accuracy against the stride, of a former default or of all but it."""
    parts = []
    for same_chunk in (False, True):
        swept = scores.at_strides(same_chunk=same_chunk)
        swept = swept[(swept["method"] == PEAK) == former]
        chunk = swept["chunk"].astype(str) if same_chunk else "as the stride"
        parts.append(swept.assign(chunk=chunk))
    found = pd.concat(parts)
    if found.empty:
        return UNMEASURED
    keys = {
        "task": "{problems} at {share}",
        "method": "{label}",
        "chunk": "{chunk}",
        "n": "{n}",
    }
    order = map(str, sorted(found["stride"].unique()))
    return grid(found, keys, "{stride}", _SCORE, order=order)


def search(found: pd.DataFrame) -> str:
    """Return a table for each phase, the policies that solve most first.

    Policies that lack a cell are left out; their number is told.

    Args:
        found: Rows of `search.csv`.
    """
    return "\n\n".join(_phase(group) for _, group in found.groupby("seed", sort=False))


def _phase(found: pd.DataFrame) -> str:
    is_loss = found["task"] == PERPLEXITY
    solved = found["score"].mask(is_loss, 0).groupby(found["method"])
    differs = (found["p_value"] < _SIGNIFICANT) & (found["method"] != BASE)
    found = found.assign(
        is_loss=is_loss,
        solved=-solved.transform("sum").round(4),
        mark=differs.fillna(False).map({True: "*", False: ""}),
        label=[
            f"**{m}**" if m == BASE else f"`{label_of(m)}`" for m in found["method"]
        ],
    )
    sizes = found.groupby("method")["task"].transform("size")
    whole = found[sizes == sizes.max()].sort_values("solved", kind="stable")
    ranks = whole.groupby("method", sort=False).ngroup()
    shown = whole[(ranks < _MOST_CHANGES) | whole["method"].isin(BASELINES)]
    # accuracies before perplexities, and larger budgets before smaller ones
    cells = found.sort_values(
        ["is_loss", "task", "context", "budget_ratio"],
        ascending=[True, True, True, False],
    )
    seed = found["seed"].iloc[0]
    name = next(name for name, preset in PRESETS.items() if preset.seed == seed)
    problems = found.drop_duplicates(["n", "is_loss"]).sort_values("is_loss")
    behind = problems["is_loss"].map({True: " for perplexity", False: ""})
    numbers = ", ".join(problems["n"].astype(str) + behind)
    title = f"**{name.capitalize()}**, problems a cell: {numbers}, seed {seed}"
    if missing := found["method"].nunique() - whole["method"].nunique():
        title += f"; {missing} more were not measured in every cell"
    if others := whole["method"].nunique() - shown["method"].nunique():
        title += f"; {others} that solve less are in `search.csv`"
    column = "{problems}, {share}"
    order = dict.fromkeys(texts(cells, column))
    keys = {"change": "{label}"}
    return grid(shown, keys, column, "{score:.2f}{mark}", title, order)


def kvpress(found: pd.DataFrame) -> str:
    """Return the table of another library's methods.

    Args:
        found: Rows of `kvpress.csv`.
    """
    found = found.assign(press=found["method"].replace("full", "full cache"))
    columns = {"task": "{problems}", "press": "{press}", "kept": "{share}"}
    return lines(found, {**columns, "accuracy": _SCORE, "n": "{n}"})


def hard(found: pd.DataFrame) -> str:
    """Return the tables of tasks that a model was trained for.

    Args:
        found: Rows of `hard.csv`.
    """
    scores = matching(found, metric="accuracy")
    swept = scores[scores["method"] != "full"]
    whole = _by_task("method", scores[scores["problems"].isin(swept["problems"])])
    single = found[found["metric"].str.startswith(QUESTION_METRIC)]
    single = single[single["problems"].isin(swept["problems"])]
    if single.empty:
        return whole
    number = single["metric"].str.removeprefix(QUESTION_METRIC)
    single = single.assign(number=number).sort_values("budget_ratio", kind="stable")
    keys = {"task": "{problems}", "method": "{label}", "kept": "{share}"}
    order = sorted(number.unique())
    return (
        f"{whole}\n\n{grid(single, keys, '{number}', _SCORE, '**By question**', order)}"
    )


def _by_task(key: str, found: pd.DataFrame) -> str:
    """Return a table of methods and shares kept for each task.

    Args:
        key: What the table calls the methods.
        found: Rows.
    """
    parts = []
    for _, group in found.groupby(["task", "context"], sort=False):
        full = matching(group, method="full")
        swept = group[group["method"] != "full"]
        (caption,) = texts(full, f"**{{problems}}**, n = {{n}}, full cache {_SCORE}")
        order = swept.sort_values("budget_ratio", ascending=False)["share"].unique()
        keys = {key: "{label}"}
        parts.append(grid(swept, keys, "{share}", _SCORE, caption, order))
    return "\n\n".join(parts)


def pace(found: pd.DataFrame) -> str:
    """Return a table for each peak of memory, and each pace's mean over the tasks.

    Args:
        found: Rows of `pace.csv`.
    """
    full = matching(found, method="full")
    parts = []
    measured = matching(found, engine="vllm")
    for memory in sorted(measured.loc[measured["budget"] > 0, "budget"].unique()):
        swept = matching(measured, budget=memory)
        every = with_mean(pd.concat([full, swept]))
        every = every.assign(
            label=every["method"].replace({"full": "full cache"}),
            cell=[
                whole or score
                for whole, score in zip(
                    texts(every, _SCORE), texts(every, "{score:.2f}"), strict=True
                )
            ],
        )
        caption = f"**At most {memory:,} tokens in a step**, n = {{n}}"
        (title,) = texts(swept.head(1), caption)
        keys = {"tokens a step": "{label}"}
        parts.append(grid(every, keys, "{problems}", "{cell}", title))
    return "\n\n".join(parts) or UNMEASURED


def pace_study(found: pd.DataFrame) -> str:
    """Return the best and the worst pace of each kind, by the mean of both texts.

    Args:
        found: Rows of `pace_study.csv`.
    """
    found = found.assign(kind=found["pace"].map(kind_of_pace))
    texts_of = found.groupby("pace")["text"].transform("nunique")
    both = found[texts_of == found["text"].nunique()]
    means = both.groupby("pace", sort=False)["score"].transform("mean")
    ranked = both.assign(mean=means.round(4)).sort_values("mean", kind="stable")
    ends = ranked.groupby("kind")["pace"].agg(["first", "last"])
    shown = ranked[ranked["pace"].isin({*ends["first"], *ends["last"]})]
    shown = shown.sort_values("mean", ascending=False, kind="stable")
    shown = shown.assign(
        # in every step, or on average
        tokens=shown.groupby("pace")["chunk"].transform("mean").round().astype(int)
    )
    keys = {"pace": "{kind}: {pace}", "tokens a step, mean": "{tokens}"}
    return grid(shown, keys, "{text}", _SCORE, order=("mixed", "prose"))


def turns(found: pd.DataFrame) -> str:
    """Return the answers found in conversations that are read in different ways.

    Args:
        found: Rows of `turns.csv`.
    """
    found = found.sort_values("teller", ascending=False, kind="stable")
    is_full = found["budget"] == 0
    ends = found["turn_end_token_ids"].map({"model": "yes", "none": "no"}).fillna("")
    shown = found.assign(
        kept=found["budget"].map("{:,}".format).mask(is_full, "full cache"),
        most=found["chunk"].map("{:,}".format).mask(is_full, ""),
        ends=ends,
    )
    keys = {
        "told by": "{teller}",
        "budget": "{kept}",
        "chunk, at most": "{most}",
        "chunks end with turns": "{ends}",
        "answers": "{answers}",
        "n": "{n}",
    }
    cell = f"{{right}}: {_SCORE}"
    return grid(shown, keys, "{context:,} tokens of prose", cell)


_PARTS: dict[str, Callable[[Scores], str]] = {
    "source": _source,
    "headline": _headline,
    "choice": _choice,
    "budget": _accuracy,
    "unsolved": _unsolved,
    "perplexity": _perplexity,
    "generation": _generation,
    "stride": _strides,
    "stride_before": partial(_strides, former=True),
}
"""What `quality.csv` shows."""
_OTHERS: dict[str, Callable[[pd.DataFrame], str]] = {
    "search": search,
    "kvpress": kvpress,
    "modes": partial(_by_task, "mode"),
    "windows": partial(_by_task, "method"),
    "fp8": partial(_by_task, "kept"),
    "hard": hard,
    "written": partial(_by_task, "mode and method"),
    "pace": pace,
}
"""Tables of CSV files of their own, by their name."""
_OWN: dict[str, Callable[[pd.DataFrame], str]] = {
    "pace_study": pace_study,
    "turns": turns,
}
"""Likewise, of rows that name no method of the grid."""
