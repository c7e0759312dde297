"""Several sources as one, with weights or caps."""

from __future__ import annotations

import inspect
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

import numpy as np

from halos.checks import check_number, check_whole
from halos.data.records.adapted import FILTERED
from halos.data.records.table import joined, table_of
from halos.data.sources.base import Records, Source
from halos.data.sources.feedback_files import FeedbackFiles
from halos.data.sources.file_source import FileSource, check_ids
from halos.data.sources.hh import HHSource
from halos.data.sources.oasst import OasstSource
from halos.data.sources.shp import SHPSource
from halos.data.sources.ultrafeedback import UltraFeedbackSource

SOURCES: dict[str, type[FileSource]] = {
    kind.name: kind for kind in (FeedbackFiles, HHSource, SHPSource, OasstSource, UltraFeedbackSource)
}


@final
class MixedSource(Source):
    """The records of several sources, one source after the other (training shuffles them).

    Args:
        mix: for each source, under a name of the user's: ``data`` (files by default), ``train``, ``val`` and the other
            settings of that source, with ``weight`` or ``cap`` or neither. A cap is the maximum of training records.
            Weights are shares: the sources that have one give as many records, drawn with the seed, as keep the shares
            exact up to one record without repeating any. Validation data is never reduced.
        seed: seed of the draws.

    Raises:
        ValueError: for a setting that cannot be used; the message names the source.
    """

    name = "mix"

    def __init__(self, mix: Mapping[str, Mapping[str, Any]] | None = None, seed: int = 0) -> None:
        if not mix:
            raise ValueError("data=mix needs data.mix='{NAME: {data: json, train: FILE, weight: 1}, …}'")
        self._sources: dict[str, FileSource] = {}
        self._weights: dict[str, float] = {}
        self._caps: dict[str, int] = {}
        self._seed = seed
        self._names: dict[str, list[np.ndarray]] = {name: [] for name in mix}
        for name, settings in mix.items():
            options = dict(settings)
            weight, cap = options.pop("weight", None), options.pop("cap", None)
            self._sources[name] = _make(name, options)
            self.whole_trees |= self._sources[name].whole_trees
            if weight is not None:
                check_number(f"data.mix.{name}.weight", weight)
                if weight == 0:
                    raise ValueError(f"data.mix.{name}.weight: expected a number above 0, found {weight}")
                self._weights[name] = weight
            if cap is not None:
                check_whole(f"data.mix.{name}.cap", cap, 1)
                self._caps[name] = cap

    def train(self) -> Records:
        read = {name: source.train() for name, source in self._opened()}
        counts = {name: min(len(r.records), self._caps.get(name, len(r.records))) for name, r in read.items()}
        # A cap limits a source before the weights are applied, so a small cap reduces all weighted sources.
        counts |= shares({name: counts[name] for name in self._weights}, self._weights)
        drawn = {name: _drawn(name, records, counts[name], self._seed) for name, records in read.items()}
        return self._joined(drawn)

    def val(self) -> Records | None:
        read = {name: records for name, source in self._opened() if (records := source.val()) is not None}
        return self._joined(read) if read else None

    def names_of(self, part: str) -> np.ndarray:
        if part not in self._names:
            names = ", ".join(self._names)
            raise ValueError(f"loss.data: expected the name of a source in data.mix ({names}), found {part}")
        return np.concatenate(self._names[part])

    def check_first_rows(self) -> None:
        for _, source in self._opened():
            source.check_first_rows()

    def check_stream(self) -> None:
        raise ValueError("data.streaming: expected one source, found data=mix, whose shares need the number of records")

    def _joined(self, splits: Mapping[str, Records]) -> Records:
        for name, records in splits.items():
            self._names[name].append(table_of(records.records).numbers("name"))
        return _joined([*splits.values()])

    def _opened(self) -> Iterator[tuple[str, FileSource]]:
        # Store and limits are known only after the constructor: the data module sets them.
        for name, source in self._sources.items():
            source.store, source.reading = self.store, self.reading
            yield name, source


def shares(available: Mapping[str, int], weights: Mapping[str, float]) -> dict[str, int]:
    """Return how many records to take of each source.

    The counts have the proportions of the weights and are as large as possible without taking a record twice.

    Args:
        available: the number of records of each source.
        weights: the weight of each source.
    """
    if not weights:
        return {}
    total = min(available[name] / weight for name, weight in weights.items())
    # The source that limits the total is taken whole, whatever rounding says.
    return {name: max(1, min(available[name], round(total * weight))) for name, weight in weights.items()}


def _make(name: str, options: dict[str, Any]) -> FileSource:
    kind = options.pop("data", "files")
    if not isinstance(kind, str) or kind not in SOURCES:
        raise ValueError(f"data.mix.{name}.data: expected one of {', '.join(SOURCES)}, found {kind!r}")
    source, settings = SOURCES[kind], {"train": None, **options}
    # Bound before it is called: a TypeError from inside the constructor is a fault of the code, not of the settings.
    try:
        inspect.signature(source).bind(**settings)
    except TypeError as error:
        raise ValueError(f"data.mix.{name}: {kind} does not take these settings: {error}") from None
    try:
        return source(**settings)
    except ValueError as error:
        raise ValueError(f"data.mix.{name}: {error}") from None


def _drawn(name: str, split: Records, count: int, seed: int) -> Records:
    surplus = len(split.records) - count
    if surplus <= 0:
        return split
    places = np.sort(random.Random(seed).sample(range(len(split.records)), count))
    dropped = split.dropped + Counter({f"{FILTERED}records of {name} beyond its cap or share": surplus})
    return Records(table_of(split.records).take(places), dropped, split.origins)


def _joined(splits: Sequence[Records]) -> Records:
    records = joined([table_of(split.records) for split in splits])
    try:
        check_ids(records)
    except ValueError as error:
        raise ValueError(f"data.mix: {error}") from None
    dropped = sum((split.dropped for split in splits), Counter())
    return Records(records, dropped, {file: origin for split in splits for file, origin in split.origins.items()})
