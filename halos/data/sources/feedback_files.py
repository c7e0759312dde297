"""Files of feedback in the layouts that people have; the columns of each row tell which."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import final

import numpy as np

from halos.checks import check_mapping
from halos.data.layouts.layouts import Layouts
from halos.data.layouts.roles import Declaration, declared
from halos.data.layouts.values import Values
from halos.data.layouts.votes import VoteRule
from halos.data.reading.files import Piece, read_piece
from halos.data.reading.json_files import Located, MalformedRow, parse_json
from halos.data.reading.tables import MESSAGES
from halos.data.records.adapted import Adapted, FileCounts
from halos.data.records.record import MESSAGE_ROLES
from halos.data.records.table import RecordTable
from halos.data.sources.combined import combine, scores_in_a_row
from halos.data.sources.file_source import Files, FileSource

STRUCTURED = frozenset(
    ["messages", "conversations", "completions", "preferences", "history", "votes", "answers", "steps"]
)
"""Columns whose cells are JSON in a CSV file, beside those that are declared for these roles."""
CHOICES = {"ties": ("drop", "keep"), "transcripts": ("split", "keep")}


@final
class FeedbackFiles(FileSource):
    """Files of feedback in the layouts that people have, recognised row by row.

    Args:
        train: files of training data.
        val: files of validation data.
        columns: the column of each role, where its name does not tell it
            (:data:`halos.data.layouts.roles.COLUMN_ROLES`), and ``ignore``.
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
            if ours not in MESSAGE_ROLES:
                raise ValueError(f"data.roles.{theirs}: expected one of {', '.join(MESSAGE_ROLES)}, found {ours!r}")
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


def _cell(where: str, name: str, cell: object, *, parses: bool) -> object:
    """Return a cell of a CSV file; messages, and what stands in columns of lists, are parsed."""
    # Not every text that begins with a brace is JSON: prompts are about code, too.
    if not isinstance(cell, str) or not (MESSAGES.match(cell) or (parses and cell.lstrip().startswith(("[", "{")))):
        return cell
    return parse_json(f"{where}: {name}", cell)
