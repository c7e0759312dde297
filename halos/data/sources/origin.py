"""What each file gave, and what was left out of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from halos.data.sources.formats import FILTERED, Adapted

SHOWN_PLACES = 5
"""Places named for each reason to leave something out."""


@dataclass(slots=True)
class Origin:
    """What one file gave: rows read, records made of them, and what was left out, by reason, with the first places."""

    rows: int = 0
    records: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, adapted: Adapted) -> None:
        where, record, dropped = adapted
        self.records += record is not None
        self.drop(where, dropped)

    def drop(self, where: str, dropped: Counter[str]) -> None:
        """Count what was left out at a place."""
        self.dropped += dropped
        for reason in dropped:
            self._place(reason, [where])

    def join(self, other: Origin) -> None:
        """Add what a later part of the same file gave."""
        self.rows, self.records = self.rows + other.rows, self.records + other.records
        self.dropped.update(other.dropped)
        for reason, places in other.places.items():
            self._place(reason, places)

    def _place(self, reason: str, found: list[str]) -> None:
        places = self.places.setdefault(reason, [])
        places.extend(found[: SHOWN_PLACES - len(places)])


def faults(origins: Mapping[str, Origin]) -> str:
    """What was left out because the data are at fault, with the first places; empty if nothing was."""
    found = [
        f"{reason} ({count}: {', '.join(origin.places[reason])}{', …' if count > len(origin.places[reason]) else ''})"
        for origin in origins.values()
        for reason, count in origin.dropped.items()
        if not reason.startswith(FILTERED)
    ]
    return "; ".join(found)
