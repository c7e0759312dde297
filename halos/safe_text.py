"""Text of others, made safe to print: what would control a terminal, a spreadsheet or a typesetter is shown instead.

Prompts, completions, ids, names of files and labels of runs come from whoever made them. :func:`visible` is applied
wherever such text is printed, logged or put into a report; the other functions add what their format needs.
"""

from __future__ import annotations

import io
import re
import sys
import unicodedata

INVISIBLE = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's categories of what has no shape of its own: controls (C0, DEL, C1), formats (bidirectional overrides and
isolates, zero-width characters, tags), halves of surrogate pairs, and separators of lines and paragraphs."""
MAX_LABEL = 200
"""Characters of a text in a figure."""
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def visible(text: str, *, one_line: bool = False) -> str:
    r"""Replace each invisible character by its escape, such as ``\x1b`` or ``\u202e``.

    Args:
        text: any text.
        one_line: whether to replace line breaks and tabs too, which are kept otherwise.
    """
    if text.isprintable():  # the usual case, in one call
        return text
    allowed = "" if one_line else "\n\t"
    return "".join(_escape(c) if unicodedata.category(c) in INVISIBLE and c not in allowed else c for c in text)


def csv_cell(text: str) -> str:
    """One line that no spreadsheet reads as a formula: an apostrophe comes first where it would. Numbers stay."""
    line = visible(text, one_line=True)
    # Excel also takes the wide forms of these characters, as input methods for Chinese and Japanese write them.
    return f"'{line}" if line.startswith(tuple("=+-@＝＋－＠")) and not _NUMBER.fullmatch(line) else line


def markdown(text: str) -> str:
    """One line of Markdown that shows the text as it is; only a bare address still becomes a link on GitHub."""
    # An underscore between letters or digits means nothing.
    line = re.sub(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", visible(text, one_line=True))
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def markdown_block(text: str) -> str:
    """A code block of Markdown that shows the text as it is, line by line."""
    # Indented, as a fence could be closed by the text.
    return "\n".join(f"    {line}" for line in visible(text).split("\n"))


def mathtext(text: str) -> str:
    """One line for a figure of matplotlib, which would read what stands between two dollars as a formula.

    It has up to :data:`MAX_LABEL` characters, as matplotlib draws each of them: a megabyte would take minutes.
    """
    line = visible(text, one_line=True)
    line = line if len(line) <= MAX_LABEL else line[: MAX_LABEL - 1] + "…"
    return line.replace("$", r"\$")


def accept_any_text() -> None:
    """Let stdout and stderr escape what their encoding lacks, where Python would end the command with an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook has streams of another kind, which take any text
            stream.reconfigure(errors="backslashreplace")


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
