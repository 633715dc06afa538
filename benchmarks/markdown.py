# SPDX-License-Identifier: Apache-2.0
"""Markdown tables, and the places of a page that are filled from results.

A page names each place between two comments, and `fill` replaces what is there::

    <!-- table: prefill -->
    <!-- end -->

A cell is a pattern such as `{low:.1f} to {high:.1f}` that each row fills in.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from string import Formatter

import pandas as pd

UNMEASURED = "Not measured yet."

_PLACE = re.compile(
    r"(?P<begin><!-- table: (?P<name>\S+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL
)


def texts(rows: pd.DataFrame, pattern: str) -> list[str]:
    """Return the pattern as each row fills it in, empty where a number is missing."""
    fields = [field for _, field, _, _ in Formatter().parse(pattern) if field]
    values = zip(*(rows[field] for field in fields), strict=True)
    return [
        ""
        if any(pd.isna(value) for value in row)
        else pattern.format(**dict(zip(fields, row, strict=True)))
        for row in values
    ]


def lines(rows: pd.DataFrame, columns: Mapping[str, str], caption: str = "") -> str:
    """Return a table with a line for each row.

    Args:
        rows: What to show.
        columns: Title to pattern.
        caption: Stands above.
    """
    return table(
        pd.DataFrame({title: texts(rows, text) for title, text in columns.items()}),
        caption,
    )


def grid(
    rows: pd.DataFrame,
    keys: Mapping[str, str],
    column: str,
    cell: str,
    caption: str = "",
    order: Iterable[str] = (),
) -> str:
    """Return a table with a line and a column for every value, as they appear.

    Args:
        rows: One for each cell.
        keys: Title to pattern of what tells the lines apart.
        column: Pattern of the other columns' titles.
        cell: Pattern.
        caption: Stands above.
        order: Of the other columns, where it is not that of the rows.
    """
    found = pd.DataFrame({title: texts(rows, text) for title, text in keys.items()})
    found["column"], found["cell"] = texts(rows, column), texts(rows, cell)
    pivoted = found.pivot(index=list(keys), columns="column", values="cell")
    titles = [title for title in order if title in pivoted] or found["column"].unique()
    places = found[list(keys)].drop_duplicates()
    return table(places.join(pivoted[titles], on=list(keys)), caption)


def table(cells: pd.DataFrame, caption: str = "") -> str:
    """Return a table of cells as they are."""
    if cells.empty:
        return UNMEASURED
    text = (
        cells.astype(object)
        .fillna("")
        .to_markdown(index=False, tablefmt="github", disable_numparse=True)
    )
    return f"{caption}\n\n{text}" if caption else text


def fill(page: str, found: Mapping[str, str]) -> str:
    """Return a page with its places filled.

    Args:
        page: Markdown with places.
        found: What there is, by name.

    Raises:
        ValueError: The page names what there cannot be.
    """

    def replaced(place: re.Match[str]) -> str:
        name = place["name"]
        if name not in found:
            raise ValueError(
                f"there is no table {name!r}. Use one of {', '.join(sorted(found))}."
            )
        return f"{place['begin']}\n{found[name]}\n\n{place['end']}"

    return _PLACE.sub(replaced, page)
