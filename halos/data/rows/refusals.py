"""Counts examples that cannot become token rows, and raises one error about them for the whole data set."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from halos.data.reading.fields import shorten
from halos.data.rows.rendering import common_length

SHOWN = 3
"""Places that an error names."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why one example cannot become a row.

    Attributes:
        kind: ``boundary`` (the template does not continue its own prompt), ``turns`` (it writes an earlier
            assistant turn differently from the last one) or ``markup`` (special tokens in a text).
        where: the place of the example in the data.
        shown: what is wrong with it.
        setting: a setting that helps, such as ``key=value``, if one is known.
    """

    kind: str
    where: str
    shown: str
    setting: str = ""


@dataclass(slots=True)
class Refusals:
    """Counts of refusals, and the first of each kind.

    Attributes:
        counts: the number of examples by kind.
        first: the first refusals by kind.
    """

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, list[Refusal]] = field(default_factory=dict)

    def add(self, refusals: Iterable[Refusal]) -> None:
        """Count refusals; several of one example count once."""
        for one in {(refusal.kind, refusal.where): refusal for refusal in refusals}.values():
            self.counts[one.kind] = self.counts.get(one.kind, 0) + 1
            self.first.setdefault(one.kind, []).append(one)
            del self.first[one.kind][SHOWN:]

    def notes(self) -> dict[str, object]:
        """Return them as plain JSON."""
        first = {kind: [[r.where, r.shown, r.setting] for r in places] for kind, places in self.first.items()}
        return {kind: [count, first[kind]] for kind, count in self.counts.items()}


def check_refusals(parts: Sequence[Mapping[str, Any]], examples: int, template: str) -> None:
    """Raise an error if examples were refused.

    Args:
        parts: the notes of the parts of a data set, from :meth:`Refusals.notes`.
        examples: examples in all parts.
        template: the text of the chat template, for what the error recommends.

    Raises:
        ValueError: some examples were refused.
    """
    for kind, message in (("markup", _markup), ("boundary", _boundary), ("turns", _turns)):
        notes = [part[kind] for part in parts if kind in part]
        if not notes:
            continue
        count = sum(number for number, _ in notes)
        first = [place for _, places in notes for place in places][:SHOWN]
        names = ", ".join(where for where, _, _ in first) + (", …" if count > len(first) else "")
        _, shown, setting = first[0]
        raise ValueError(message(f"{count:,} of {examples:,} examples", names, shown, _help(template, setting)))


def _markup(count: str, names: str, shown: str, help_: str) -> str:
    return (
        f"data: expected texts without special tokens of the tokenizer, found some in {count} ({names}): {shown}. "
        "A tokenizer reads them as markup; remove them, or set data.text=rendered if prompts and completions carry "
        "their markup already"
    )


def _boundary(count: str, names: str, shown: str, help_: str) -> str:
    return (
        f"data: expected the chat template to write every prompt the same way with and without its reply, found "
        f"{count} where it does not ({names}): {shown}. The model would be trained on another text than it is served; "
        f"{help_}"
    )


def _turns(count: str, names: str, shown: str, help_: str) -> str:
    return (
        "data: expected the chat template to write each assistant turn of a completion as it does where it is the last,"
        f" found {count} where it does not ({names}): {shown}. The model would be trained on another text than it is "
        "served; choose another template with model.chat_template=…, set data.train_on=all for demonstrations, or move "
        "all but the last turn into the prompt"
    )


def _help(template: str, setting: str) -> str:
    choices = [f"set {setting}"] if setting else []
    choices.append("choose another template with model.chat_template=…")
    if re.search("think|reasoning", template):
        choices.append("put the reasoning that the template expects into the data")
    return ", or ".join(choices)


def differing(alone: str, with_reply: str) -> str:
    """Describe where a prompt differs from the beginning of the same prompt with its reply."""
    at = common_length(alone, with_reply)
    return (
        f"after {shorten(alone[max(0, at - 30) : at])} follows {shorten(alone[at : at + 30])} in the prompt alone, "
        f"{shorten(with_reply[at : at + 30])} with the reply"
    )
