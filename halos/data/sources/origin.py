"""Counts of what was read from each file, and of what was left out of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from halos.data.sources.adapted import COLUMN, FILTERED, NOTED, Adapted

SHOWN_PLACES = 5
"""Places listed for each reason to leave something out."""


COUNTERS = ("dropped", "noted", "columns")


@dataclass(slots=True)
class Origin:
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

    def add(self, adapted: Adapted) -> None:
        """Count what an adapter returned for a row."""
        where, record, dropped = adapted
        self.records += record is not None
        self.drop(where, dropped)

    def drop(self, where: str, dropped: Counter[str]) -> None:
        """Count what was left out of a row, and what was noted of it."""
        for reason, count in dropped.items():
            if reason.startswith(COLUMN):
                self.columns[reason.removeprefix(COLUMN)] += count
            elif reason.startswith(NOTED):
                self.noted[reason.removeprefix(NOTED)] += count
                self._add_places(reason, [where])
            else:
                self.dropped[reason] += count
                self._add_places(reason, [where])

    def join(self, other: Origin) -> None:
        """Add the counts of a later part of the same file."""
        self.rows, self.records = self.rows + other.rows, self.records + other.records
        for name in COUNTERS:
            getattr(self, name).update(getattr(other, name))
        for reason, places in other.places.items():
            self._add_places(reason, places)

    def _add_places(self, reason: str, places: list[str]) -> None:
        listed = self.places.setdefault(reason, [])
        listed.extend(places[: SHOWN_PLACES - len(listed)])


def check_faultless(origins: Mapping[str, Origin]) -> None:
    """Raise ``ValueError`` with the first places if anything was left out because the data is at fault."""
    reasons = [
        f"{reason} ({count}: {', '.join(origin.places[reason])}{', …' if count > len(origin.places[reason]) else ''})"
        for origin in origins.values()
        for reason, count in origin.dropped.items()
        if not reason.startswith(FILTERED)
    ]
    if reasons:
        raise ValueError(f"data.strict: expected nothing to leave out; found {'; '.join(reasons)}")
