"""Write the pages of docs/ that are made from the code: combinations, configuration, losses, what was run, …

python scripts/write_docs.py
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # as a script this file sees its own folder only; the code of this checkout comes first

from halos.config.combinations import TRAITS, table  # noqa: E402
from scripts.pages.commands import commands_page  # noqa: E402
from scripts.pages.config_keys import config_page  # noqa: E402
from scripts.pages.family import draw_family, family_page  # noqa: E402
from scripts.pages.losses import index_page, loss_page, notes  # noqa: E402
from scripts.pages.papers import papers_page  # noqa: E402
from scripts.pages.speed import SPEED_PAGE, speed_page  # noqa: E402
from scripts.pages.was_run import was_run_page  # noqa: E402

DOCS = ROOT / "docs"
COMBINATIONS = DOCS / "reference" / "combinations.md"
FAMILY = DOCS / "concepts" / "family.md"


def written_pages() -> dict[Path, str]:
    """Return the pages that are made from the code, by their files; the family's takes a minute, and is left out."""
    return {
        COMBINATIONS: combinations_page(),
        DOCS / "reference" / "config.md": config_page(),
        DOCS / "reference" / "commands.md": commands_page(),
        DOCS / "reference" / "papers.md": papers_page(),
        DOCS / "reference" / "what-was-run.md": was_run_page(),
        SPEED_PAGE: speed_page(),
        DOCS / "losses" / "index.md": index_page(),
        **{DOCS / "losses" / f"{name}.md": loss_page(name) for name in notes()},
    }


def combinations_page() -> str:
    """Return the page of settings that do not go together, in Markdown."""
    rows = [f"| {_keys(key)} | {_keys(others)} | {expected} | {reason} |" for key, others, expected, reason in table()]
    traits = [f"- {trait}: {meaning}" for trait, meaning in TRAITS.items()]
    lines = [
        "# Settings that do not go together",
        "",
        "A run with one of these combinations is refused before any long work. The error begins with the key in the",
        "first column, which is the one to change. The list is `RULES` in",
        "[combinations.py](../../halos/config/combinations.py). `python scripts/write_docs.py` writes this page.",
        "",
        "| Key | Together with | Expected | Why, or what to do |",
        "|---|---|---|---|",
        *rows,
        "",
        "Words in the first two columns that are not keys of the configuration:",
        "",
        *traits,
    ]
    return "\n".join(lines) + "\n"


def _keys(names: str) -> str:
    return ", ".join(name if name in TRAITS else f"`{name}`" for name in names.split(", ") if name)


if __name__ == "__main__":
    for file, text in (written_pages() | {FAMILY: family_page()}).items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    draw_family(FAMILY.with_suffix(".png"))
