# SPDX-License-Identifier: Apache-2.0
"""A hook of MkDocs: pages that lie outside of `docs/`, and links that leave it.

The same Markdown is read on a forge and on the site. On a forge a link is relative to
the file in the repository; on the site some files have other places, and code has none.
Items of lists inside of lists stand two spaces in, for which MkDocs needs four.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).parents[1]

PAGES: Mapping[str, str] = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "patches/README.md": "patches.md",
}
"""Files of the repository that are pages, and what they are called on the site."""

_FILES = {page: file for file, page in PAGES.items()}
_FENCED = re.compile(r"^( *)(```|~~~).*?^\1\2", re.MULTILINE | re.DOTALL)
_INNER_ITEM = re.compile(r"^  (?=[*-] )", re.MULTILINE)
_LINK = re.compile(r"(?P<text>!?\[[^\]]*\])\((?P<target>[^)\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie outside of `docs/` (an event of MkDocs)."""
    from mkdocs.structure.files import File

    for file, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / file)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn a page's links (an event of MkDocs)."""
    return as_on_site(markdown, page.file.src_uri, config.repo_url)


def as_on_site(markdown: str, page: str, repo_url: str | None = None) -> str:
    """Return a page's text with the links and lists that it has on the site.

    Args:
        markdown: As it stands in the repository.
        page: The page's place on the site, such as `index.md`.
        repo_url: Where links to what is no page go; None leaves their text alone.
    """
    here = PurePosixPath(_FILES.get(page, f"docs/{page}"))

    def turned(link: re.Match[str]) -> str:
        text, target = link["text"], link["target"]
        if re.match(r"#|[a-z]+:", target):
            return link[0]
        path, mark, anchor = target.partition("#")
        file = posixpath.normpath(here.parent / path)
        if file in PAGES:
            place = PAGES[file]
        elif file.startswith("docs/"):
            place = file.removeprefix("docs/")
        elif not (ROOT / file).exists():
            # for MkDocs to complain of
            return link[0]
        elif repo_url is None:
            return text[1:-1]
        else:
            return f"{text}({repo_url.rstrip('/')}/blob/main/{file})"
        relative = posixpath.relpath(place, posixpath.dirname(page) or ".")
        return f"{text}({relative}{mark}{anchor})"

    def changed(text: str) -> str:
        return _INNER_ITEM.sub(" " * 4, _LINK.sub(turned, text))

    parts, end = [], 0
    for fenced in _FENCED.finditer(markdown):
        parts += [changed(markdown[end : fenced.start()]), fenced[0]]
        end = fenced.end()
    return "".join([*parts, changed(markdown[end:])])
