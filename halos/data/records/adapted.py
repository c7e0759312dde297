"""What a source makes of each row, counts of it for each file, and the completions that every source leaves out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, combinations

from halos.data.records.record import Record

Adapted = tuple[str, Record | None, Counter[str]]
"""The location of a row, its record if it has one, and counts of what was left out of it, by reason."""

DIFFERENT_PROMPTS = "pair with different prompts"
FILTERED = "filtered: "
"""Begins the reasons that a setting causes; all others are faults of the data."""
NOTED = "noted: "
"""Begins what is counted without being left out."""
COLUMN = "column "
"""Begins the counts of rows in which a column was used or unused."""
BAD_ROW = f"{FILTERED}malformed rows"
SHOWN_PLACES = 5
"""Places listed for each reason to leave something out."""


def by_rank(ranks: Sequence[float | None]) -> tuple[tuple[int, int], ...]:
    """Return a preference for every two completions with different ranks, of which the lower is better.

    Equal ranks mean that nobody decided between the two. A completion without a rank is in no preference.
    """
    ranked = [(n, rank) for n, rank in enumerate(ranks) if rank is not None]
    return tuple(
        (i, j) if rank < other else (j, i) for (i, rank), (j, other) in combinations(ranked, 2) if rank != other
    )


def without_empty(record: Record, dropped: Counter[str]) -> Record | None:
    """Return the record without completions that are only white space; None if nothing is left."""
    filled = [i for i, completion in enumerate(record.completions) if completion.text.strip()]
    if len(filled) == len(record.completions):
        return record
    dropped["empty completion"] += len(record.completions) - len(filled)
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
        dropped["completion whose pair has an empty side"] += len(orphans)
    position = {old: new for new, old in enumerate(i for i in filled if i not in orphans)}
    if not position:
        return None
    return replace(
        record,
        completions=tuple(record.completions[i] for i in position),
        preferences=tuple((position[better], position[worse]) for better, worse in preferences),
    )


COUNTERS = ("dropped", "noted", "columns")
"""The attributes of :class:`FileCounts` that are counters."""


@dataclass(slots=True)
class FileCounts:
    """Counts of what was read from one file.

    Attributes:
        rows: rows that were read.
        records: records made from them.
        dropped: counts of what was left out, by reason.
        places: for each reason, the locations of the first rows.
        noted: counts of what was converted or looks odd, and was kept.
        columns: rows in which each column was used, by ``name: role``, or ``name: unused``.
    """

    rows: int = 0
    records: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)
    noted: Counter[str] = field(default_factory=Counter)
    columns: Counter[str] = field(default_factory=Counter)

    def drop(self, where: str, dropped: Counter[str]) -> None:
        """Count what was left out of a row, and what was noted of it."""
        for reason, count in dropped.items():
            if reason.startswith(COLUMN):
                self.columns[reason.removeprefix(COLUMN)] += count
                continue
            counts = self.noted if reason.startswith(NOTED) else self.dropped
            counts[reason.removeprefix(NOTED)] += count
            self._add_places(reason, [where])

    def join(self, other: FileCounts) -> None:
        """Add the counts of a later part of the same file."""
        self.rows, self.records = self.rows + other.rows, self.records + other.records
        for name in COUNTERS:
            getattr(self, name).update(getattr(other, name))
        for reason, places in other.places.items():
            self._add_places(reason, places)

    def _add_places(self, reason: str, places: list[str]) -> None:
        listed = self.places.setdefault(reason, [])
        listed.extend(places[: SHOWN_PLACES - len(listed)])


def check_faultless(origins: Mapping[str, FileCounts]) -> None:
    """Raise ``ValueError`` with the first places if anything was left out because the data is at fault."""
    reasons = [
        f"{reason} ({count}: {', '.join(origin.places[reason])}{', …' if count > len(origin.places[reason]) else ''})"
        for origin in origins.values()
        for reason, count in origin.dropped.items()
        if not reason.startswith(FILTERED)
    ]
    if reasons:
        raise ValueError(f"data.strict: expected nothing to leave out; found {'; '.join(reasons)}")
