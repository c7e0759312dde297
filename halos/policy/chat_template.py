"""Sets a tokenizer's chat template by ``model.chat_template`` and the settings that begin with it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import date
from typing import TYPE_CHECKING

from halos.data.rows.rendering import today
from halos.data.rows.templates import TEMPLATES, chosen, is_dated, template_of, with_date, with_defaults
from halos.policy.checks import check_markers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def set_chat_template(
    tokenizer: PreTrainedTokenizerBase, template: str | None, values: Mapping[str, object], day: date, *, model: str
) -> None:
    """Replace the tokenizer's chat template by the one for training and export. Replacements and dates are logged.

    Args:
        tokenizer: the tokenizer, which is changed.
        template: ``model.chat_template``; None: the tokenizer's own.
        values: defaults of the template's variables.
        day: the date in the text of a template that uses ``strftime_now``.
        model: the model's path, for messages.

    Raises:
        ValueError: if the template cannot be used, or if the tokenizer has several templates, none is named and none is
            the default.
    """
    if template is not None:
        if tokenizer.chat_template is not None:
            log.info("model.chat_template replaces the chat template of %s", model)
        tokenizer.chat_template = template_of(template, tokenizer.chat_template)
        check_markers(tokenizer, refuse=template in TEMPLATES)
    elif isinstance(tokenizer.chat_template, dict):
        chosen(tokenizer.chat_template)  # raises where none is the default
        names = ", ".join(sorted(tokenizer.chat_template))
        log.info("%s has the chat templates %s: default is used; model.chat_template=NAME uses another", model, names)
    tokenizer.chat_template = with_defaults(tokenizer.chat_template, values)
    if is_dated(tokenizer.chat_template):
        log.warning(
            "the chat template writes today's date: training writes %s throughout (model.chat_template_date); the "
            "exported template writes the day on which it is used",
            day,
        )
        tokenizer.chat_template = with_date(tokenizer.chat_template, day)


def template_day(text: str | None) -> date:
    """Return the date of ``model.chat_template_date``. None: the day on which the process started.

    Raises:
        ValueError: for a text that is not a date.
    """
    if text is None:
        return today()
    try:
        return date.fromisoformat(text)
    except (TypeError, ValueError):
        raise ValueError(f"model.chat_template_date: expected a date as YYYY-MM-DD or null, found {text!r}") from None
