"""Recognises the layout of each row by its columns, and makes its record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from halos.data.layouts import steps
from halos.data.layouts.chats import is_chat
from halos.data.layouts.convert import Converter
from halos.data.layouts.exports import is_label_studio, is_open_webui, label_studio_row, open_webui_record
from halos.data.layouts.hints import column_word
from halos.data.layouts.recognise import recognised
from halos.data.layouts.roles import Declaration, check_declared, has_content
from halos.data.layouts.unused import refused_columns, role_of_refused, unclear_judgement, used_columns
from halos.data.reading.fields import MAX_KEYS, TEMPLATE_FIELDS, RawRow, keys_of
from halos.data.records.adapted import COLUMN, Adapted
from halos.data.records.record import Record
from halos.data.sources.hh import hh_record
from halos.data.sources.oasst import is_tree, tree_records

KNOWN_FIELDS = TEMPLATE_FIELDS | {"role", "content", "from", "value", "weight"}


@dataclass(slots=True)
class _Layout:
    """The layout of all rows with the same columns.

    Attributes:
        converter: makes their records; None for exports that are read by a function of their own.
        columns: the use of each column: its role, ``ignored`` or ``unused``.
        rows: the number of these rows so far.
    """

    converter: Converter | None
    columns: dict[str, str]
    rows: int = 0


class Layouts:
    """Recognises the layout of each row and makes its record.

    Args:
        declaration: the user's settings for columns and values.
    """

    def __init__(self, declaration: Declaration) -> None:
        self.declaration = declaration
        self._layouts: dict[object, _Layout] = {}

    def __repr__(self) -> str:
        # The key of prepared data contains this text, which must not depend on the layouts that were recognised so far.
        return f"Layouts({self.declaration})"

    def adapted(self, where: str, row: RawRow) -> Iterator[Adapted]:
        """Yield the records of a row: one in most layouts, one for each prompt in a conversation tree.

        Args:
            where: the location of the row.
            row: the row.

        Raises:
            ValueError: the row is malformed or in no known layout, or has a column that would be lost.
        """
        if is_tree(row):
            self._note_columns(where, row, {"prompt": "messages"})
            yield from tree_records(where, row)
            return
        dropped: Counter[str] = Counter()
        yield where, self.record(where, row, dropped), dropped

    def record(self, where: str, row: RawRow, dropped: Counter[str]) -> Record | None:
        """Return the record of a row that is not a tree; None if nothing is left of it. See :meth:`adapted`.

        Args:
            where: the location of the row.
            row: the row.
            dropped: receives counts of what is left out and of what is converted.
        """
        if is_open_webui(row):
            self._note_columns(where, row, {"data": "label", "meta": "messages", "snapshot": "messages"})
            return open_webui_record(where, row, self.declaration.values, dropped)
        task: RawRow | None = row
        if is_label_studio(row):
            self._note_columns(where, row, {"annotations": "judgement", "data": "see its own columns"})
            task = label_studio_row(where, row, self.declaration.votes, dropped)
        if task is None:
            return None
        if _is_transcript(task) and not self.declaration.columns:
            self._note_columns(where, task, {"chosen": "chosen", "rejected": "rejected"})
            return hh_record(where, task, dropped)
        layout = self._layout_of(where, task)
        layout.rows += 1
        assert layout.converter is not None
        return layout.converter(where, task, dropped)

    def _note_columns(self, where: str, row: RawRow, used: Mapping[str, str]) -> None:
        """Count the columns of a row that has a function of its own; raise ``ValueError`` if content would be lost."""
        key = ("exports", *((name, has_content(value)) for name, value in row.items()))
        if key not in self._layouts:
            roles = {**{role: name for name, role in used.items()}, "label": ""}
            others = {name: value for name, value in row.items() if name not in used}
            if refused := refused_columns(others, roles, self.declaration.ignore):
                raise ValueError(_refusal(where, row, refused))
            ignored = dict.fromkeys(self.declaration.ignore, "ignored")
            self._layouts[key] = _Layout(None, {name: used.get(name, ignored.get(name, "unused")) for name in row})
        self._layouts[key].rows += 1

    def _layout_of(self, where: str, row: RawRow) -> _Layout:
        kinds = [type(value) if has_content(value) else None for value in row.values()]
        name = row.get("type")
        key = (*row, *kinds, name if isinstance(name, str) else None)
        layout = self._layouts.get(key)
        if layout is None:
            layout = self._layouts[key] = self._recognise(where, row)
        return layout

    def _recognise(self, where: str, row: RawRow) -> _Layout:
        says = self.declaration
        check_declared(where, row, says.columns)
        roles = recognised(where, row, says.columns, says.ignore)
        if candidates := unclear_judgement(row, roles, says.ignore):
            words = " or ".join(column_word("score", name) for name in candidates[:MAX_KEYS])
            raise ValueError(
                f"{where}: expected to know which column judges the completion, found numbers in "
                f"{keys_of(dict.fromkeys(candidates))}; choose with {words}, or leave them out with "
                f"{column_word('ignore', *candidates)}"
            )
        if refused := refused_columns(row, roles, says.ignore):
            raise ValueError(_refusal(where, row, refused))
        used = used_columns(row, roles)
        ignored = dict.fromkeys(says.ignore, "ignored")
        columns = {name: used.get(name, ignored.get(name, "unused")) for name in row}
        for name in used:
            fields = steps.unused_fields if used[name] == "steps" else unused_fields
            columns |= {f"{name}[].{field}": "unused" for field in fields(row.get(name))}
        return _Layout(Converter(roles, says), columns)

    def columns(self) -> Counter[str]:
        """Return the use of each column, with the number of rows."""
        counts: Counter[str] = Counter()
        for layout in self._layouts.values():
            for name, use in layout.columns.items():
                counts[f"{COLUMN}{name}: {use}"] += layout.rows
        return counts


def unused_fields(value: object) -> list[str]:
    """Return the keys of a column's messages that no template reads."""
    turns = value if is_chat(value) and isinstance(value, list) else []
    names = {str(name): None for turn in turns if isinstance(turn, dict) for name in turn}
    return [name for name in names if name not in KNOWN_FIELDS]


def _refusal(where: str, row: RawRow, names: list[str]) -> str:
    modalities = [n for n in names if n.casefold().rstrip("s") in ("image", "picture", "video", "audio")]
    if modalities:
        return (
            f"{where}: expected text, found the column {modalities[0]!r}: halos trains on text; leave it out with "
            f"{column_word('ignore', *modalities)}"
        )
    role = role_of_refused(names[0], row)
    use = f"name its role, perhaps {column_word(role, names[0])}"
    if role == "input":
        use = f"put it into the prompt with {column_word(role, names[0])} (or name another role: data.columns.ROLE=…)"
    return (
        f"{where}: expected a use for every column with content, found none for {keys_of(dict.fromkeys(names))}; "
        f"{use}, or leave it out with {column_word('ignore', *names)}; the columns are {keys_of(row)}"
    )


def _is_transcript(row: RawRow) -> bool:
    """Return whether a row is a pair of HH's transcripts, each of which contains the prompt."""
    return "prompt" not in row and all(
        isinstance(text := row.get(key), str) and text.lstrip().startswith("Human:") and "\n\nAssistant:" in text
        for key in ("chosen", "rejected")
    )


def to_record(where: str, row: RawRow, dropped: Counter[str]) -> Record | None:
    """Return the record of one row whose layout is recognised without any declaration."""
    return Layouts(Declaration()).record(where, row, dropped)
