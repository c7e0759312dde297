"""The result of a source's adapter for each row, and the rows that all adapters leave out.

An adapter takes (location, row, dropped) and returns a record. It returns None for a row that is well formed but has
nothing to learn from. It counts the reason in ``dropped`` then, and for each completion that it leaves out. Malformed
rows raise ``ValueError``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain

from halos.data.reading.fields import RawRow
from halos.data.reading.json_files import Located
from halos.data.records.record import Record

Adapter = Callable[[str, RawRow, Counter[str]], Record | None]
Adapted = tuple[str, Record | None, Counter[str]]
"""The location of a row, its record if it has one, and counts of what was left out of it, by reason."""

EMPTY = "empty completion"
EMPTY_SIDE = "completion whose pair has an empty side"
DIFFERENT_PROMPTS = "pair with different prompts"
FILTERED = "filtered: "
"""Begins the reasons that a setting causes; all others are faults of the data."""
NOTED = "noted: "
"""Begins what is counted without being left out."""
COLUMN = "column "
"""Begins the counts of rows in which a column was used or unused."""
BAD_ROW = f"{FILTERED}malformed rows"


def by_row(rows: Iterable[Located], adapter: Adapter) -> Iterator[Adapted]:
    """Adapt the rows of a format that has one record in each row."""
    for where, row in rows:
        dropped: Counter[str] = Counter()
        yield where, adapter(where, row, dropped), dropped


def without_empty(record: Record, dropped: Counter[str]) -> Record | None:
    """Return the record without completions that are only white space; None if nothing is left."""
    filled = [i for i, completion in enumerate(record.completions) if completion.text.strip()]
    if len(filled) == len(record.completions):
        return record
    dropped[EMPTY] += len(record.completions) - len(filled)
    preferences = [pair for pair in record.preferences if set(pair) <= set(filled)]
    # A completion that was judged only by a pair which is gone would pass for one that nobody judged. The worse side
    # of such a pair would, alone with its score, pass for the best.
    beaten = {worse for _, worse in record.preferences}
    orphans = {
        i
        for i in set(chain(*record.preferences)).intersection(filled).difference(chain(*preferences))
        if record.completions[i].desirable is None and (record.completions[i].score is None or i in beaten)
    }
    if orphans:
        dropped[EMPTY_SIDE] += len(orphans)
    position = {old: new for new, old in enumerate(i for i in filled if i not in orphans)}
    if not position:
        return None
    return replace(
        record,
        completions=tuple(record.completions[i] for i in position),
        preferences=tuple((position[better], position[worse]) for better, worse in preferences),
    )
