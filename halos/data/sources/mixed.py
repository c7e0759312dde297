"""Several sources as one, by weights or with caps."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, final

import numpy as np

from halos.data.records.table import RecordTable, joined, table_of
from halos.data.sources.base import FileSource, Records, Source, check_ids
from halos.data.sources.formats import FILTERED
from halos.data.sources.hh import HHSource
from halos.data.sources.json_source import JsonSource
from halos.data.sources.oasst import OasstSource
from halos.data.sources.shp import SHPSource
from halos.data.sources.ultrafeedback import UltraFeedbackSource

SOURCES: dict[str, type[FileSource]] = {
    kind.name: kind for kind in (JsonSource, HHSource, SHPSource, OasstSource, UltraFeedbackSource)
}


@final
class MixedSource(Source):
    """The records of several sources, one source after the other (training shuffles them).

    Args:
        mix: for each source, under a name of the user's, ``data`` (json unless told otherwise), ``train``, ``val`` and
            what else that source takes, with ``weight`` or ``cap`` or neither. A cap is the most training records
            taken. Weights are shares: of the sources that have one as many records are taken, drawn with the seed, as
            keep the shares exact up to one record without repeating any. Validation data are taken whole.
        seed: of the draws.

    Raises ``ValueError`` naming the source for whatever cannot be used.
    """

    name = "mix"

    def __init__(self, mix: Mapping[str, Mapping[str, Any]] | None = None, seed: int = 0) -> None:
        if not mix:
            raise ValueError("data=mix needs data.mix='{NAME: {data: json, train: FILE, weight: 1}, …}'")
        self._sources: dict[str, FileSource] = {}
        self._weights: dict[str, float] = {}
        self._caps: dict[str, int] = {}
        self._seed = seed
        for name, given in mix.items():
            options = dict(given)
            weight, cap = options.pop("weight", None), options.pop("cap", None)
            self._sources[name] = _make(name, options)
            self.whole_trees |= self._sources[name].whole_trees
            if weight is not None:
                self._weights[name] = _positive(f"data.mix.{name}.weight", weight)
            if cap is not None:
                self._caps[name] = int(_positive(f"data.mix.{name}.cap", cap, least=1))

    def train(self) -> Records:
        read = {name: source.train() for name, source in self._opened()}
        most = {name: min(len(r.records), self._caps.get(name, len(r.records))) for name, r in read.items()}
        most |= shares({name: most[name] for name in self._weights}, self._weights)
        return _joined(
            Records(
                _drawn(table_of(r.records), most[name], self._seed), r.dropped + _beyond(name, r, most[name]), r.origins
            )
            for name, r in read.items()
        )

    def val(self) -> Records | None:
        read = [found for _, source in self._opened() if (found := source.val()) is not None]
        return _joined(read) if read else None

    def check_stream(self) -> None:
        raise ValueError("data.streaming: expected one source, found data=mix, whose shares need the number of records")

    def _opened(self) -> Iterator[tuple[str, FileSource]]:
        for name, source in self._sources.items():
            source.store = self.store
            yield name, source


def shares(available: Mapping[str, int], weights: Mapping[str, float]) -> dict[str, int]:
    """How many records to take of each source, so that they are to each other as the weights and none comes twice."""
    if not weights:
        return {}
    total = min(available[name] / weight for name, weight in weights.items())
    # The source that sets the total is taken whole, whatever rounding says.
    return {name: max(1, min(available[name], round(total * weight))) for name, weight in weights.items()}


def _make(name: str, options: dict[str, Any]) -> FileSource:
    kind = options.pop("data", "json")
    if kind not in SOURCES:
        raise ValueError(f"data.mix.{name}.data: expected one of {', '.join(SOURCES)}, found {kind!r}")
    try:
        return SOURCES[kind](**{"train": None, **options})
    except TypeError as error:
        raise ValueError(f"data.mix.{name}: {kind} does not take these settings: {error}") from None
    except ValueError as error:
        raise ValueError(f"data.mix.{name}: {error}") from None


def _positive(name: str, value: Any, least: float = 0.0) -> float:
    if type(value) not in (int, float) or value <= 0 or value < least or (least and value != int(value)):
        raise ValueError(f"{name}: expected a {'whole ' if least else ''}number above 0, found {value!r}")
    return float(value)


def _drawn(records: RecordTable, most: int, seed: int) -> RecordTable:
    if most >= len(records):
        return records
    return records.take(np.sort(random.Random(seed).sample(range(len(records)), most)))


def _beyond(name: str, read: Records, most: int) -> Counter[str]:
    return +Counter({f"{FILTERED}records of {name} beyond its cap or share": len(read.records) - most})


def _joined(parts: Iterable[Records]) -> Records:
    parts = list(parts)
    records = joined([table_of(part.records) for part in parts])
    try:
        check_ids(records)
    except ValueError as error:
        raise ValueError(f"data.mix: {error}") from None
    found = Records(records, Counter(), {})
    for part in parts:
        found.dropped.update(part.dropped)
        found.origins.update(part.origins)
    return found
