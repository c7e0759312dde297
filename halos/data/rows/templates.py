"""Chat templates: named ones, values that a template gets by default, the date, and a control token that it writes.

All are written into the template's text. So the tokenizer alone decides how a prompt looks, the cache key of token ids
covers it, and a server of the exported model writes the same prompt without further settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import date
from typing import TypeVar

from halos.data.rows.switches import reads
from halos.files import in_home

Template = str | dict[str, str]
"""A Jinja template, or several by name."""
T = TypeVar("T", str, Template, None)

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}:\n{{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
"""Used for conversations when the tokenizer has no chat template of its own."""

CHATML_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TEMPLATES = {"plain": PLAIN_TEMPLATE, "chatml": CHATML_TEMPLATE}

ALWAYS_PASSED = ("messages", "tools", "documents", "add_generation_prompt")
"""Variables that every caller of a template passes, so that a default would never be read."""
_DATE_START, _DATE_END = "{# the date of a halos run #}", "{% endmacro %}\n"
_CONTROL_START, _CONTROL_END = "{# a control token of halos #}{% if add_generation_prompt %}", "{% endif %}"
_DIRECTIVES = ("Y", "y", "-m", "m", "-d", "d", "e", "B", "b", "A", "a", "j", "-H", "H", "-I", "I", "M", "S", "p")


def template_of(template: str, tokenizer_template: Template | None = None) -> str:
    """Find a template by its name, read it from a file, or return it as it is.

    Args:
        template: a name in ``tokenizer_template`` or in :data:`TEMPLATES`, a file, or a Jinja template (a text with
            ``{{`` or ``{%``).
        tokenizer_template: the tokenizer's template, whose names come first if it has several.

    Raises:
        ValueError: it is none of these, or the file is not text.
    """
    named = TEMPLATES | (tokenizer_template if isinstance(tokenizer_template, dict) else {})
    if template in named:
        return named[template]
    if "{{" in template or "{%" in template:
        return template
    file = in_home(template)
    if not file.is_file():
        raise ValueError(f"model.chat_template: expected {', '.join(named)}, a file or Jinja, found {template!r}")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"model.chat_template: expected a text file, but {file} cannot be read as text: {error}"
        ) from None


def chosen(template: Template | None, *, tools: bool = False) -> str | None:
    """Return the template that transformers and servers use; of several it is ``default``, or ``tool_use`` with tools.

    Raises:
        ValueError: there are several, and none of these names.
    """
    if not isinstance(template, dict):
        return template
    name = "tool_use" if tools and "tool_use" in template else "default"
    if name not in template:
        raise ValueError(
            f"model.chat_template: the tokenizer has the chat templates {', '.join(sorted(template))} and none named "
            f"default; choose one, such as model.chat_template={min(template)}"
        )
    return template[name]


def each(template: T, change: Callable[[str], str]) -> T:
    """Change a template, or each of several."""
    if isinstance(template, dict):
        return {name: change(text) for name, text in template.items()}
    return template if template is None else change(template)


def with_defaults(template: T, values: Mapping[str, object]) -> T:
    """Make a template read these values where its caller passes no others (``model.chat_template_kwargs``).

    Args:
        template: the template, or several.
        values: plain values by the names of variables of the template.

    Raises:
        ValueError: the template has no such variable, or callers always pass it.
    """
    texts = list(template.values()) if isinstance(template, dict) else [template or ""]
    for name in values:
        if name in ALWAYS_PASSED or not any(reads(text, name) for text in texts):
            raise ValueError(
                f"model.chat_template_kwargs.{name}: expected a variable that the chat template reads, found none of "
                "this name in it"
            )
    # The line break ends the line that the prefix has begun: transformers removes it after a block, and trims the
    # white space before a block only where that begins a line.
    prefix = "".join(
        f"{{% if {name} is not defined %}}{{% set {name} = {value!r} %}}{{% endif %}}" for name, value in values.items()
    )
    return each(template, lambda text: f"{prefix}\n{text}") if values else template


def is_dated(template: Template | None) -> bool:
    """Whether a template writes today's date."""
    texts = template.values() if isinstance(template, dict) else [template or ""]
    return any("strftime_now" in text and not text.startswith(_DATE_START) for text in texts)


def with_date(template: T, day: date) -> T:
    """Make a template that writes today's date write this one; other templates are returned as they are."""
    filters = "".join(f"|replace('%{name}', '{day.strftime(f'%{name}')}')" for name in _DIRECTIVES)
    prefix = f"{_DATE_START}{{% macro strftime_now(format) %}}{{{{ format{filters} }}}}{_DATE_END}"
    return each(template, lambda text: prefix + text if is_dated(text) else text)


def without_date(template: T) -> T:
    """Undo :func:`with_date`: the template writes the day on which it is used, as an exported model should."""

    def undated(text: str) -> str:
        return text.partition(_DATE_END)[2] if text.startswith(_DATE_START) else text

    return each(template, undated)


def with_control(template: T, control: str) -> T:
    """Make a template end its generation prompt with a control token (CSFT), exactly once."""
    ending = f"{_CONTROL_START}{control}{_CONTROL_END}"
    return each(template, lambda text: text.removesuffix(ending) + ending) if control else template


def without_control(template: T, control: str) -> T:
    """Undo :func:`with_control`."""
    ending = f"{_CONTROL_START}{control}{_CONTROL_END}"
    return each(template, lambda text: text.removesuffix(ending)) if control else template


def control_of(template: Template) -> str:
    """Return the control token with which a template from :func:`with_control` ends its generation prompt."""
    text = next(iter(template.values())) if isinstance(template, dict) else template
    return text.rpartition(_CONTROL_START)[2].removesuffix(_CONTROL_END) if _CONTROL_START in text else ""
