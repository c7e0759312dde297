"""Write the pages of docs/reference/ that are made from the code.

python scripts/write_docs.py
"""

from __future__ import annotations

from pathlib import Path

from halos.config.combinations import TRAITS, table

COMBINATIONS = Path(__file__).parents[1] / "docs" / "reference" / "combinations.md"


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
    COMBINATIONS.write_text(combinations_page(), encoding="utf-8")
