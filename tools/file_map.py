# SPDX-License-Identifier: Apache-2.0
"""What lies in which file: `docs/files.md`, made of the files' own first lines.

`python -m tools.file_map` prints the page; with `--write` it is made anew.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "files.md"
FOLDERS = ("vllm_roco", "benchmarks", "tests/soak", "tools")

_HEAD = """\
# What lies where

Every module of these folders, with the first line of its docstring. The same line
stands on top of the file: change it there, then run `python -m tools.file_map --write`.
Which files a change needs together is told in
[contributing](../CONTRIBUTING.md#what-goes-together).
"""


def page() -> str:
    """Return the page as Markdown.

    Raises:
        ValueError: A module has no docstring.
    """
    return "\n".join([_HEAD, *(line for top in FOLDERS for line in _section(top))])


def _section(top: str) -> Iterator[str]:
    folders = {file.parent for file in (ROOT / top).rglob("*.py")}
    for folder in sorted(folders):
        name = folder.relative_to(ROOT).as_posix()
        files = sorted(folder.glob("*.py"))
        yield f"## {name}\n"
        rows = {
            file.name: (f"[`{file.name}`](../{name}/{file.name})", _first_line(file))
            for file in files
        }
        if (own := rows.pop("__init__.py", None)) is not None:
            yield f"{': '.join(own)}\n"
        yield "| file | what is there |\n|---|---|"
        for row in rows.values():
            yield f"| {' | '.join(row)} |"
        yield ""


def _first_line(file: Path) -> str:
    docstring = ast.get_docstring(ast.parse(file.read_text()))
    if docstring is None:
        raise ValueError(f"{file.relative_to(ROOT)} does not say what it is for.")
    return docstring.splitlines()[0].replace("|", "\\|")


def main() -> None:
    """Print the page, or write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    if parser.parse_args().write:
        PAGE.write_text(page())
    else:
        print(page(), end="")


if __name__ == "__main__":
    main()
