"""Propose a mapping for files whose columns are not all recognised by name: guesses that a person confirms."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import yaml

from halos.data.layouts.recognise import recognised
from halos.data.layouts.roles import Declaration, Path, value_at
from halos.data.layouts.unused import refused_columns, unclear_judgement
from halos.data.layouts.values import Values, number_in
from halos.data.reading.fields import RawRow

DOCUMENT = re.compile(r"contexts?|documents?|passages?|background|source_text", re.IGNORECASE)
"""Columns of text that belong into the prompt."""
PROMPT_WORDS = ("quest", "prompt", "instr", "input", "query", "ask", "frage", "pregunta", "title", "topic")
COMPLETION_WORDS = ("answer", "repl", "respon", "output", "complet", "antwort", "respuesta", "text", "essay", "generat")


@dataclass(frozen=True, slots=True)
class Proposal:
    """A mapping, and what a person should look at.

    Attributes:
        declaration: columns and values; what is recognised by itself stands there too.
        remarks: guesses, each in one sentence.
    """

    declaration: Declaration
    remarks: list[str] = field(default_factory=list)


def propose(rows: Sequence[RawRow], declaration: Declaration) -> Proposal:
    """Propose a mapping for the rows of one file.

    Args:
        rows: a few rows, at least one.
        declaration: what the user says already; it is kept.

    Raises:
        ValueError: not even a guess is possible: no two columns of text.
    """
    row = max(rows, key=lambda row: sum(value not in (None, "") for value in row.values()))
    remarks: list[str] = []
    columns = dict(declaration.columns)
    try:
        columns = recognised("propose", row, columns, declaration.ignore)
    except ValueError:
        columns |= _guessed_texts(row, columns, remarks)
        columns = recognised("propose", row, columns, declaration.ignore)
    ignore = set(declaration.ignore)
    if candidates := unclear_judgement(row, columns, declaration.ignore):
        columns["score"] = candidates[0]
        remarks.append(f"the score is {candidates[0]!r}: a guess out of {', '.join(candidates)}")
    for name in refused_columns(row, columns, declaration.ignore):
        if DOCUMENT.fullmatch(name) and "input" not in columns and isinstance(row[name], str):
            columns["input"] = name
            remarks.append(f"{name!r} is put below the prompt")
        else:
            ignore.add(name)
            remarks.append(f"{name!r} is left out, although it can carry content")
    values = _values(rows, columns, declaration.values, remarks)
    return Proposal(replace(declaration, columns=columns, values=values, ignore=tuple(sorted(ignore))), remarks)


def _guessed_texts(
    row: RawRow, columns: Mapping[str, Path | tuple[Path, ...]], remarks: list[str]
) -> dict[str, Path | tuple[Path, ...]]:
    """Guess the prompt, the completion and the judgement of a row by the names and lengths of its columns."""
    texts = [key for key, value in row.items() if isinstance(value, str) and number_in(value) is None]
    texts = [key for key in texts if key not in columns.values()]
    if len(texts) < 2:
        raise ValueError(f"propose: expected two columns of text, found {', '.join(map(repr, texts)) or 'none'}")
    prompt = _first_named(texts, PROMPT_WORDS) or texts[0]
    others = [key for key in texts if key != prompt and not DOCUMENT.fullmatch(key)] or texts[1:]
    completion = _first_named(others, COMPLETION_WORDS) or max(others, key=lambda key: len(str(row[key])))
    guessed: dict[str, Path | tuple[Path, ...]] = {"prompt": prompt, "completion": completion}
    remarks.append(f"the prompt is {prompt!r} and the completion {completion!r}: guesses")
    rest = [key for key in row if key not in (prompt, completion) and row[key] not in (None, "")]
    for key in rest:
        role = _judgement_of(key, row[key])
        if role is not None:
            guessed[role] = key
            remarks.append(f"the {role} is {key!r}: a guess")
            break
    return {role: path for role, path in guessed.items() if role not in columns}


def _first_named(keys: Sequence[str], words: Sequence[str]) -> str | None:
    return next((key for word in words for key in keys if word in key.casefold()), None)


def _judgement_of(key: str, value: object) -> str | None:
    try:
        Values().label("propose", key, value)
    except ValueError:
        is_score = isinstance(value, int | float) or (isinstance(value, str) and number_in(value) is not None)
        return "score" if is_score else None
    return "label"


def _values(
    rows: Sequence[RawRow], columns: Mapping[str, Path | tuple[Path, ...]], values: Values, remarks: list[str]
) -> Values:
    """Propose meanings for the words of labels that are not known."""
    label = columns.get("label")
    if not isinstance(label, str) or "completions" in columns:
        return values
    unknown: dict[str, None] = {}
    for row in rows:
        word = value_at(row, label)
        try:
            values.label("propose", label, word)
        except ValueError:
            unknown[str(word)] = None
    if not unknown:
        return values
    desirable, undesirable = list(unknown)[:1], list(unknown)[1:]
    remarks.append(f"{desirable} mean desirable and {undesirable} undesirable: a guess, swap them where it is wrong")
    return replace(values, desirable=[*values.desirable, *desirable], undesirable=[*values.undesirable, *undesirable])


def as_yaml(proposal: Proposal, train: str) -> str:
    """Return a proposal as the text of a ``data/*.yaml``."""
    says = proposal.declaration
    columns: dict[str, object] = {
        role: path if isinstance(path, str) else list(path) for role, path in sorted(says.columns.items())
    }
    if says.ignore:
        columns["ignore"] = list(says.ignore)
    node: dict[str, object] = {"defaults": ["files", "_self_"], "train": train, "columns": columns}
    if says.roles:
        node["roles"] = dict(says.roles)
    if words := says.values.listed():
        node["values"] = words
    remarks = "".join(f"# {remark}\n" for remark in proposal.remarks)
    text: str = yaml.safe_dump(node, sort_keys=False, allow_unicode=True)
    return f"# Feedback of {train}\n{remarks}{text}"
