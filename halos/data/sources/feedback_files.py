"""Files of feedback in the layouts that people have; the columns of each row tell which."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from halos.checks import check_mapping
from halos.data.layouts import steps
from halos.data.layouts.chats import is_chat
from halos.data.layouts.convert import Converter
from halos.data.layouts.exports import is_label_studio, is_open_webui, label_studio_row, open_webui_record
from halos.data.layouts.hints import column_word
from halos.data.layouts.recognise import recognised
from halos.data.layouts.roles import Declaration, check_declared, declared, has_content
from halos.data.layouts.unused import refused_columns, role_of_refused, unclear_judgement, used_columns
from halos.data.layouts.values import Values
from halos.data.layouts.votes import VoteRule
from halos.data.reading.fields import MAX_KEYS, TEMPLATE_FIELDS, RawRow, keys_of
from halos.data.reading.files import Piece, read_piece
from halos.data.reading.json_files import Located, MalformedRow, parse_json
from halos.data.reading.tables import MESSAGES
from halos.data.records.record import ROLES, Record
from halos.data.records.table import RecordTable
from halos.data.sources.adapted import COLUMN, Adapted, FileCounts
from halos.data.sources.combined import combine, scores_in_a_row
from halos.data.sources.file_source import Files, FileSource
from halos.data.sources.hh import hh_record
from halos.data.sources.oasst import is_tree, tree_records

KNOWN_FIELDS = TEMPLATE_FIELDS | {"role", "content", "from", "value", "weight"}
STRUCTURED = frozenset(
    ["messages", "conversations", "completions", "preferences", "history", "votes", "answers", "steps"]
)
"""Columns whose cells are JSON in a CSV file, beside those that are declared for these roles."""
CHOICES = {"ties": ("drop", "keep"), "transcripts": ("split", "keep")}


@dataclass(slots=True)
class _Layout:
    """What is known of the rows whose columns agree.

    Attributes:
        converter: makes their records; None for exports that are read by a function of their own.
        columns: what became of each column: its role, or ``unused``.
        rows: how many rows there were.
    """

    converter: Converter | None
    columns: dict[str, str]
    rows: int = 0


class Layouts:
    """Recognises the layout of each row and makes its record.

    Args:
        declaration: what the user says about columns and values.
    """

    def __init__(self, declaration: Declaration) -> None:
        self.declaration = declaration
        self._layouts: dict[object, _Layout] = {}

    def __repr__(self) -> str:
        # These settings are in the key of prepared data, but not the layouts that were recognised so far.
        return f"Layouts({self.declaration})"

    def adapted(self, where: str, row: RawRow) -> Iterator[Adapted]:
        """Yield what a row gives: one record in most layouts, one for each prompt in a conversation tree.

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
        """Return the record of a row that has one, None if nothing is left of it; see :meth:`adapted`.

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
        """Count the columns of a row that is read by a function of its own; refuse those that would be lost."""
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
        """Return for each column what became of it, and in how many rows."""
        counts: Counter[str] = Counter()
        for layout in self._layouts.values():
            for name, use in layout.columns.items():
                counts[f"{COLUMN}{name}: {use}"] += layout.rows
        return counts


def unused_fields(value: object) -> list[str]:
    """Return the names in the messages of a column that no template reads."""
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
    """Return whether a row is a pair of HH's transcripts, each with the prompt in it."""
    return "prompt" not in row and all(
        isinstance(text := row.get(key), str) and text.lstrip().startswith("Human:") and "\n\nAssistant:" in text
        for key in ("chosen", "rejected")
    )


@final
class FeedbackFiles(FileSource):
    """Files of feedback in the layouts that people have, recognised row by row.

    Args:
        train: files of training data.
        val: files of validation data.
        columns: the column of each role, where its name does not tell it (:data:`.ROLES`), and ``ignore``.
        roles: names of roles in messages: ``{human: user}``.
        values: words that stand for judgements, see :class:`.Values`.
        ties: ``drop`` leaves comparisons out that nobody won; ``keep`` keeps their completions without a preference.
        votes: how votes of several people, or rows that disagree about the same reply, become a label, see
            :class:`.VoteRule`.
        transcripts: ``split`` makes turns of a prompt ``Human: … Assistant:``; ``keep`` keeps the text.
        bad_rows: ``stop`` at the first malformed row; ``skip`` counts malformed rows and leaves them out.
        max_bad_rows: more malformed rows in a file than this end a run with ``bad_rows=skip``.

    Raises:
        ValueError: a setting has none of its values.
    """

    name = "files"
    rows_alone = True

    def __init__(
        self,
        train: Files | None,
        val: Files | None = None,
        columns: Mapping[str, str | Sequence[str] | None] | None = None,
        roles: Mapping[str, str] | None = None,
        values: Mapping[str, Sequence[object] | None] | None = None,
        ties: str = "drop",
        votes: str | float = "majority",
        transcripts: str = "split",
        bad_rows: str = "stop",
        max_bad_rows: int = 100,
    ) -> None:
        super().__init__(train, val, None, bad_rows, max_bad_rows)
        for name, mapping in (("columns", columns), ("roles", roles), ("values", values)):
            check_mapping(f"data.{name}", mapping)
        for name, value in (("ties", ties), ("transcripts", transcripts)):
            if value not in CHOICES[name]:
                raise ValueError(f"data.{name}: expected {' or '.join(CHOICES[name])}, found {value!r}")
        for theirs, ours in (roles or {}).items():
            if ours not in ROLES:
                raise ValueError(f"data.roles.{theirs}: expected one of {', '.join(ROLES)}, found {ours!r}")
        paths, ignore = declared(columns)
        words = Values(**{name: listed for name, listed in (values or {}).items() if listed is not None})
        self.declaration = Declaration(
            paths, dict(roles or {}), words, ignore, ties == "keep", transcripts == "split", VoteRule(votes)
        )

    def rows(self, piece: Piece, *, streaming: bool = False) -> Iterator[Located]:
        # Cells are converted by the role of their column, which is known only after the row is recognised.
        skips, has_cells = self._max_bad_rows is not None, piece.has_cells
        lists = STRUCTURED | {self.declaration.columns.get(role) for role in STRUCTURED}
        for paths in self.declaration.columns.values():  # a dotted path leads into the JSON of its column
            for path in (paths,) if isinstance(paths, str) else paths:
                lists |= {path.partition(".")[0]} if "." in path else set()
        for where, row in read_piece(piece, streaming=streaming, convert_cells=False, keep_malformed=skips):
            if has_cells and not isinstance(row, MalformedRow):
                row = {name: _cell(where, name, value, parses=name in lists) for name, value in row.items()}
            yield where, row

    def adapted(self, rows: Iterable[Located]) -> Iterator[Adapted]:
        return self._adapted(rows, average=False)  # equal replies may stand in other pieces too

    def adapted_one_by_one(self, rows: Iterable[Located]) -> Iterator[Adapted]:
        return self._adapted(rows, average=True)

    def _adapted(self, rows: Iterable[Located], *, average: bool) -> Iterator[Adapted]:
        layouts = Layouts(self.declaration)
        yield from scores_in_a_row(self.each_row(rows, layouts.adapted), average=average)
        # One entry for all rows: counting the columns of each row would take as long as reading it.
        yield "", None, layouts.columns()

    def combined(self, records: RecordTable, origins: dict[str, FileCounts]) -> RecordTable:
        names = list(origins)
        of_parts = [(names.index(part["file"]), part["origin"]["records"]) for part in records.table.notes]
        files = np.repeat(*np.array(of_parts, np.int64).reshape(-1, 2).T)
        scored = [_scores_are_rows(origin) for origin in origins.values()]
        combined = combine(records, files, scored, self.declaration.votes, self.store)
        for first, counts in combined.counts:
            origins[names[files[first]]].drop(records.where(first), counts)
        for n, count in enumerate(np.bincount(files[combined.removed], minlength=len(names)).tolist()):
            origins[names[n]].records -= count
        return combined.records


def _scores_are_rows(origin: FileCounts) -> bool:
    """Return whether the scored rows of a file have one reply each: no row has several, scored against each other."""
    roles = {column.rpartition(": ")[2] for column in origin.columns}
    return "score" in roles and not roles & {"completions", "sides", "chosen"}


def to_record(where: str, row: RawRow, dropped: Counter[str]) -> Record | None:
    """Return the record of one row whose layout is recognised without any declaration."""
    return Layouts(Declaration()).record(where, row, dropped)


def _cell(where: str, name: str, cell: object, *, parses: bool) -> object:
    """Return a cell of a CSV file; messages, and what stands in columns of lists, are parsed."""
    # Not every text that begins with a brace is JSON: prompts are about code, too.
    if not isinstance(cell, str) or not (MESSAGES.match(cell) or (parses and cell.lstrip().startswith(("[", "{")))):
        return cell
    return parse_json(f"{where}: {name}", cell)
