"""MkDocs hooks: links to files of the repository that are no pages, and roles of Sphinx in docstrings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?:\.\./)+[^)#\s]+)(#[^)\s]*)?\)")
ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):<code>[.~]*")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Point links out of docs/ at the repository's web page, or keep only their text where it has none."""
    docs, here = Path(config["docs_dir"]), Path(page.file.abs_src_path).parent

    def outside(match: re.Match[str]) -> str:
        target = (here / match[2]).resolve()
        if target.is_relative_to(docs):
            return match[0]
        address = config["repo_url"]
        return f"[{match[1]}]({address}/blob/main/{target.relative_to(docs.parent)})" if address else match[1]

    return LINK.sub(outside, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Show the names in :class:`…` of docstrings as code."""
    return ROLE.sub("<code>", html)
