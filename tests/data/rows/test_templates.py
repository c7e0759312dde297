"""Chat templates: which one is used, the values that it gets, and the date that it writes."""

from datetime import date
from pathlib import Path
from typing import Any

import pytest

from halos.data.rows.templates import (
    CHATML_TEMPLATE,
    PLAIN_TEMPLATE,
    chosen,
    is_dated,
    template_of,
    with_date,
    with_defaults,
    without_date,
)
from tests.tiny import CHATML, WITH_EOT, bpe_tokenizer

DAY = date(2026, 3, 5)
BODIES = ["x", "\nx", "  {% if true %}a{% endif %}", " \n{% if true %}\n b\n{% endif %}\n", "{%- if x -%} q{% endif %}"]


def rendered(template: Any, **values: Any) -> str:
    tokenizer = bpe_tokenizer(template)
    return str(tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, **values))


def test_a_name_a_file_or_the_template_itself(tmp_path: Path) -> None:
    assert (template_of("plain"), template_of("chatml")) == (PLAIN_TEMPLATE, CHATML_TEMPLATE)
    assert template_of(WITH_EOT) == WITH_EOT
    file = tmp_path / "mine.jinja"
    file.write_text(CHATML)
    assert template_of(str(file)) == CHATML
    file.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"mine.jinja cannot be read as text"):
        template_of(str(file))
    with pytest.raises(ValueError, match="expected plain, chatml, a file or Jinja, found 'chatlm'"):
        template_of("chatlm")


def test_one_of_several_by_its_name() -> None:
    several = {"default": "{{ 1 }}", "rag": "{{ 2 }}", "tool_use": "{{ 3 }}"}
    assert template_of("rag", several) == "{{ 2 }}"
    assert template_of("plain", several) == PLAIN_TEMPLATE
    assert (chosen(several), chosen(several, tools=True), chosen("x", tools=True)) == ("{{ 1 }}", "{{ 3 }}", "x")
    with pytest.raises(ValueError, match="expected plain, chatml, default, rag, tool_use, a file"):
        template_of("other", several)
    with pytest.raises(ValueError, match=r"templates a, b and none named default; choose one, such as .*template=a$"):
        chosen({"b": "", "a": ""})


@pytest.mark.parametrize("value", [False, None, 3, 0.5, 'it\'s "é🙂" {{ %}', [1, {"a": None}]])
def test_a_default_is_what_a_caller_could_pass(value: object) -> None:
    template = "{% macro say() %}{{ mode }}{% endmacro %}{% for one in messages %}{{ mode }}{% endfor %}{{ say() }}"
    made = with_defaults(template, {"mode": value})
    assert rendered(made) == rendered(template, mode=value)
    assert rendered(made, mode="other") == rendered(template, mode="other")
    assert rendered(with_defaults(made, {"mode": 7})) == rendered(template, mode=7), "the outer default comes first"


@pytest.mark.parametrize("body", BODIES)
def test_neither_defaults_nor_the_date_change_white_space(body: str) -> None:
    template = body + "{# z #}{{ strftime_now('') }}"
    assert rendered(with_defaults(template, {"z": 1})) == rendered(template)
    assert rendered(with_date(template, DAY)) == rendered(template)


@pytest.mark.parametrize("name", ["enable_thinkin", "messages", "tools"])
def test_a_value_that_the_template_never_reads_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^model\.chat_template_kwargs\.{name}: expected a variable"):
        with_defaults("{{ messages }}{{ tools }}{{ enable_thinking }}", {name: False})
    with pytest.raises(ValueError, match="expected a variable that the chat template reads"):
        with_defaults(None, {"enable_thinking": False})


def test_each_of_several_templates_gets_the_values() -> None:
    made: Any = with_defaults({"default": "{{ x }}", "tool_use": "y"}, {"x": 5})
    assert (rendered(made), made["tool_use"].endswith("\ny")) == ("5", True)
    assert with_defaults("y", {}) == "y"


def test_the_date_is_fixed_and_becomes_the_days_again() -> None:
    template = (
        "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}"
        "{% for one in messages %}{{ strftime_now('%-d/%m/%y %A %j %H:%M') }}{% endfor %}"
    )
    fixed = with_date(template, DAY)
    assert rendered(fixed) == "05 Mar 20265/03/26 Thursday 064 00:00"
    assert (is_dated(template), is_dated(fixed), is_dated(CHATML), is_dated(None)) == (True, False, False, False)
    assert with_date(fixed, date(2000, 1, 1)) == fixed
    assert with_date(CHATML, DAY) == without_date(CHATML) == CHATML
    assert without_date(fixed) == template
    several = {"default": template, "tool_use": CHATML}
    assert without_date(with_date(several, DAY)) == several
