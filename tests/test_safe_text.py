"""Text of others: no control or bidirectional character reaches a reader raw, in any format."""

from __future__ import annotations

import re
import sys
import unicodedata

import markdown as markdown_package
import pytest
from hypothesis import given, settings, strategies as st
from matplotlib.cbook import is_math_text

from halos.safe_text import csv_cell, markdown, markdown_block, mathtext, visible

CONTROLS = [chr(n) for n in (*range(0x20), *range(0x7F, 0xA0))]
"""C0, DEL and C1."""
BIDIRECTIONAL = [chr(n) for n in (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))]
"""Marks, embeddings, overrides and isolates: those that Unicode's report 9 lists."""
INVISIBLE = [chr(n) for n in (0xAD, 0x200B, 0x200C, 0x200D, 0x2028, 0x2029, 0x2060, 0xFEFF, 0xD800, 0xDFFF, 0xE0001)]
BAD = [*CONTROLS, *BIDIRECTIONAL, *INVISIBLE]
HARMLESS = "plain text, Grüße, 漢字, שלום, مرحبا, 👍🏽, ⟦x⟧, a\u00a0b, \ue000, {}[]()<>|&%#_^~\\\\\\'\"`"

SHOWS = {"visible": visible, "csv": csv_cell, "markdown": markdown, "markdown_block": markdown_block, "math": mathtext}


@pytest.mark.parametrize("show", SHOWS.values(), ids=SHOWS)
def test_every_control_and_bidirectional_character_is_shown_escaped(show: object) -> None:
    assert len(BAD) == 65 + 12 + 11
    for character in BAD:
        shown = show(f"a{character}b")  # type: ignore[operator]
        if show in (visible, markdown_block) and character in "\n\t":
            continue
        assert character not in shown
        # The escape is Python's own, so that a reader can look it up.
        assert character.encode("unicode_escape").decode() in shown.replace("\\\\", "\\")


def test_exactly_the_characters_without_a_shape_are_escaped() -> None:
    for number in range(sys.maxunicode + 1):
        character = chr(number)
        invisible = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
        assert (visible(character, one_line=True) != character) == invisible


def test_other_text_stays_as_it_is() -> None:
    assert visible(HARMLESS) == visible(HARMLESS, one_line=True) == HARMLESS
    assert visible("a\n\tb") == "a\n\tb"
    assert visible("a\n\tb\r", one_line=True) == r"a\n\tb\r"


@given(st.text(st.characters(codec=None) | st.sampled_from(BAD)))
@settings(derandomize=True, max_examples=500)
def test_what_is_shown_can_be_written_and_stays_what_it_is(text: str) -> None:
    shown = visible(text, one_line=True)
    assert shown.encode("utf-8").decode("utf-8") == shown
    assert len(shown.splitlines()) <= 1
    assert visible(shown) == shown == visible(visible(text), one_line=True)


FORMULAS = ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "＝1", "-", "=", "+1+1", "-1;=2"]
NOT_FORMULAS = ["-1.5", "+3", "-.5e-3", "1", "kto", "a=b", "\t=1", "\r=1", "\n=1", "\x00=1", "", " =1", "'=1", "-0"]


@pytest.mark.parametrize("text", FORMULAS)
def test_a_cell_that_a_spreadsheet_would_compute_gets_an_apostrophe(text: str) -> None:
    assert csv_cell(text) == f"'{text}"


@pytest.mark.parametrize("text", NOT_FORMULAS)
def test_numbers_and_other_texts_get_none(text: str) -> None:
    assert csv_cell(text) == visible(text, one_line=True)
    assert csv_cell(text)[:1] not in tuple("=@\t\r\n")


MARKDOWN = [
    "![x](http://127.0.0.1/track.png)",
    "[x](javascript:alert(1))",
    "<img src=http://127.0.0.1/track.png>",
    "<script>alert(1)</script>",
    "**b** *i* _u_ __v__ ~~s~~ `c` ``d``",
    "a | b",
    "| a | b |\n|---|---|\n| c | d |",
    "&lt;b&gt; &amp;",
    "$x$ $$y$$",
    "# h\n- l\n> q\n\n    code",
    "```\n<b>x</b>\n```",
    "~~~\n<b>x</b>\n~~~",
    "\x02wzxhzdk:0\x03",
    "[x]: http://127.0.0.1\n\n[x]",
    "back\\slash \\[x\\](y)",
    "<!-- x",
    "    \n\n\n    x",
]


def rendered(text: str) -> str:
    """What TensorBoard makes of a text, before it removes further elements."""
    return markdown_package.markdown(text, extensions=["markdown.extensions.tables", "markdown.extensions.fenced_code"])


@pytest.mark.parametrize("text", MARKDOWN)
def test_markdown_shows_the_text_and_has_no_other_elements(text: str) -> None:
    line, block = rendered("x " + markdown(text)), rendered(f"a\n\n{markdown_block(text)}\n\nb")
    assert set(re.findall(r"<(\w+)", line)) == {"p"}
    assert set(re.findall(r"<(\w+)", block)) == {"p", "pre", "code"}
    code = re.findall("<code>(.*?)</code>", block, re.DOTALL)
    assert len(code) == 1
    unescaped = code[0].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    assert unescaped.strip() == visible(text).strip()


@pytest.mark.parametrize("text", ["$x$", r"\$x$", r"$\frac{$", "$", "$$$$", r"\\$\$", "a $ b $ c", r"$\bad{$"])
def test_a_figure_shows_dollars_and_reads_no_formula(text: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    label = figure.text(0, 0, mathtext(text))
    assert not is_math_text(mathtext(text))
    # What matplotlib draws: with an even number of dollars, none of which is a formula's, "\$" stands for "$".
    assert label._preprocess_math(mathtext(text)) == (text, False)  # type: ignore[attr-defined]
    figure.draw_without_rendering()


def test_a_figure_draws_no_more_than_the_beginning_of_a_long_text() -> None:
    assert mathtext("$" * 200) == r"\$" * 200
    assert mathtext("$" * 1_000_000) == r"\$" * 199 + "…"
