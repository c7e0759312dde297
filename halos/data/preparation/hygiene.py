"""What is wrong or worth knowing about a data set, before anything is trained on it.

All of it is found in the numbers of :mod:`halos.data.records.table`, texts are not read again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from halos.data.records.record import Record
from halos.data.records.table import RecordTable, table_of
from halos.data.sources.origin import SHOWN_PLACES, Origin

PERCENTILES = (5, 50, 95, 99, 100)


@dataclass(slots=True)
class Finding:
    """How often something was found, and the first records in which."""

    count: int = 0
    ids: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Hygiene:
    """What :func:`examine` found in one split.

    ``duplicates`` counts completions that their prompt has had before, word for word; ``near_duplicates`` those that
    are the same but for case, white space and forms of characters. ``contradictions`` counts completions of one prompt
    that are both desirable and undesirable, ``contradictory_pairs`` pairs of texts preferred both ways round, and
    ``identical_pairs`` preferences between equal texts. Lengths are in characters until there are tokens.
    """

    records: int = 0
    completions: int = 0
    desirable: int = 0
    undesirable: int = 0
    scored: int = 0
    preferences: int = 0
    duplicates: Finding = field(default_factory=Finding)
    near_duplicates: Finding = field(default_factory=Finding)
    contradictions: Finding = field(default_factory=Finding)
    contradictory_pairs: Finding = field(default_factory=Finding)
    identical_pairs: Finding = field(default_factory=Finding)
    lengths: dict[str, dict[str, int]] = field(default_factory=dict)


def examine(records: Sequence[Record]) -> Hygiene:
    """Find it out."""
    table = table_of(records)
    owner, exact = table.lists("completions")
    _, loose = table.lists("loose_completions")
    _, labels = table.lists("labels")
    _, scores = table.lists("scores")
    preferring, pairs = table.lists("pairs")
    pairs, preferring = pairs.reshape(-1, 2), preferring[::2]
    new = _first(exact)
    lengths = {"prompt": table.numbers("prompt_characters"), "completion": table.lists("completion_characters")[1]}
    return Hygiene(
        records=len(table),
        completions=len(exact),
        desirable=int((labels == 1).sum()),
        undesirable=int((labels == 0).sum()),
        scored=int((~np.isnan(scores)).sum()),
        preferences=len(pairs),
        duplicates=_found(table, owner[~new]),
        near_duplicates=_found(table, owner[new & ~_first(loose)]),
        contradictions=_found(table, owner[_contradictions(exact, labels)]),
        contradictory_pairs=_found(table, preferring[_reversed(pairs)]),
        identical_pairs=_found(table, preferring[pairs[:, 0] == 0]),
        lengths={f"{name} (characters)": percentiles(values) for name, values in lengths.items()},
    )


def _found(table: RecordTable, owners: np.ndarray) -> Finding:
    """The records in which something was found, in order, as often as it was."""
    shown = list(dict.fromkeys(owners[: 100 * SHOWN_PLACES].tolist()))[:SHOWN_PLACES]
    return Finding(len(owners), table.ids(shown))


def _first(values: np.ndarray) -> np.ndarray:
    """Whether a value comes for the first time, [n]."""
    found = np.zeros(len(values), dtype=bool)
    found[np.unique(values, return_index=True)[1]] = True
    return found


def _contradictions(texts: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The places, in order, at which a text has been marked both ways for the first time."""
    firsts = []
    for kind in (0, 1):
        places = np.flatnonzero(labels == kind)
        found, index = np.unique(texts[places], return_index=True)
        firsts.append((found, places[index]))
    _, bad, good = np.intersect1d(firsts[0][0], firsts[1][0], assume_unique=True, return_indices=True)
    return np.sort(np.maximum(firsts[0][1][bad], firsts[1][1][good]))


def _reversed(pairs: np.ndarray) -> np.ndarray:
    """The places, in order, at which a pair [n, 2] (a digest for each way round) comes for the first time and the
    other way round came before."""
    ways, index = np.unique(pairs[:, 0], return_index=True)
    other = np.minimum(np.searchsorted(ways, pairs[index, 1]), max(len(ways) - 1, 0))
    before = (ways[other] == pairs[index, 1]) & (index[other] < index) if len(ways) else np.zeros(0, dtype=bool)
    return np.sort(index[before])


def percentiles(values: Sequence[int] | np.ndarray) -> dict[str, int]:
    """Percentiles of lengths, the greatest as ``p100``; each is one that occurs."""
    if not len(values):
        return {}
    found = np.percentile(np.asarray(values), PERCENTILES, method="inverted_cdf")
    return {f"p{p}": int(value) for p, value in zip(PERCENTILES, found, strict=True)}


def without_leaks(train: Sequence[Record], val: Sequence[Record]) -> tuple[RecordTable, Finding]:
    """The validation records whose prompts are not in the training data (case, white space and forms of characters do
    not count), and the others."""
    held = table_of(val)
    leaked = np.isin(held.numbers("loose_prompt"), table_of(train).numbers("loose_prompt"))
    return held.take(np.flatnonzero(~leaked)), _found(held, np.flatnonzero(leaked))


def origin_of(example_id: str, origins: Iterable[str]) -> str:
    """The file that an example comes from, ``(named records)`` where the record had an id of its own."""
    found = [file for file in origins if example_id.startswith((f"{file}:", f"{file}["))]
    return max(found, key=len, default="(named records)")


def files_as_json(origins: Mapping[str, Origin]) -> dict[str, dict[str, Any]]:
    """What each file gave, as plain data."""
    return {
        file: {
            "rows": origin.rows,
            "records": origin.records,
            "dropped": {
                reason: {"count": count, "ids": origin.places[reason]} for reason, count in origin.dropped.items()
            },
        }
        for file, origin in origins.items()
    }


def as_json(
    hygiene: Mapping[str, Hygiene],
    origins: Mapping[str, Mapping[str, Origin]],
    reports: Mapping[str, Counter[str]],
    truncated: Mapping[str, Counter[tuple[str, str]]],
) -> dict[str, Any]:
    """Everything as plain data, for ``data_report.json``."""

    def plain(value: Any) -> Any:
        return {"count": value.count, "ids": value.ids} if isinstance(value, Finding) else value

    splits = {}
    for split, found in hygiene.items():
        cut: dict[str, dict[str, int]] = {}
        for (reason, file), count in truncated.get(split, Counter()).items():
            cut.setdefault(file, {})[reason] = count
        files = files_as_json(origins[split])
        for file, told in files.items():
            told["truncated"] = cut.pop(file, {})
        splits[split] = {
            **{name: plain(getattr(found, name)) for name in Hygiene.__slots__},
            "files": files,
            "counts": dict(reports[split]),
            **({"truncated elsewhere": cut} if cut else {}),
        }
    return splits
