"""Counts, duplicates, contradictions and leaks of a data set, found before anything is trained on it.

All checks read the columns of numbers of :mod:`halos.data.records.table`, so no text is read again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from halos.data.records.adapted import SHOWN_PLACES
from halos.data.records.record import Record
from halos.data.records.table import RecordTable, table_of

PERCENTILES = (5, 50, 95, 99, 100)


@dataclass(slots=True)
class Finding:
    """How often something was found, and the ids of the first records with it."""

    count: int = 0
    ids: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Hygiene:
    """What :func:`examine` found in one split.

    Attributes:
        records: number of records.
        completions: number of completions.
        desirable: number of completions with this label.
        undesirable: number of completions with this label.
        scored: number of completions with a score.
        preferences: number of preferences.
        duplicates: completions that equal an earlier one of their prompt, word for word.
        near_duplicates: completions that differ from an earlier one of their prompt only in case, white space and
            forms of characters.
        contradictions: completions of one prompt that are both desirable and undesirable.
        contradictory_pairs: pairs of texts that are preferred in both directions.
        identical_pairs: preferences between equal texts.
        equal_pairs: pairs of the view whose sides have the same tokens after truncation, once there are token rows.
        lengths: percentiles of lengths, in characters, and in tokens once there are token rows.
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
    equal_pairs: Finding = field(default_factory=Finding)
    lengths: dict[str, dict[str, int]] = field(default_factory=dict)


def examine(records: Sequence[Record]) -> Hygiene:
    """Count the feedback and look for duplicates and contradictions."""
    table = table_of(records)
    owner, exact = table.lists("completions")
    _, loose = table.lists("loose_completions")
    _, labels = table.lists("labels")
    _, scores = table.lists("scores")
    preferring, pairs = table.lists("pairs")
    # Each preference has two digests, one for each way round.
    pairs, preferring = pairs.reshape(-1, 2), preferring[::2]
    is_first = _first(exact)
    lengths = {"prompt": table.numbers("prompt_characters"), "completion": table.lists("completion_characters")[1]}
    return Hygiene(
        records=len(table),
        completions=len(exact),
        desirable=int((labels == 1).sum()),
        undesirable=int((labels == 0).sum()),
        scored=int((~np.isnan(scores)).sum()),
        preferences=len(pairs),
        duplicates=_finding(table, owner[~is_first]),
        near_duplicates=_finding(table, owner[is_first & ~_first(loose)]),
        contradictions=_finding(table, owner[_contradictions(exact, labels)]),
        contradictory_pairs=_finding(table, preferring[_reversed(pairs)]),
        identical_pairs=_finding(table, preferring[pairs[:, 0] == 0]),
        lengths={f"{name} (characters)": percentiles(values) for name, values in lengths.items()},
    )


def _finding(table: RecordTable, owners: np.ndarray) -> Finding:
    """Make a finding from the record of each occurrence, in order."""
    # One record may have many occurrences: look at a bounded number of them for a few different records.
    shown = list(dict.fromkeys(owners[: 100 * SHOWN_PLACES].tolist()))[:SHOWN_PLACES]
    return Finding(len(owners), table.ids(shown))


def _first(values: np.ndarray) -> np.ndarray:
    """Return whether each value, [n], occurs for the first time."""
    is_first = np.zeros(len(values), dtype=bool)
    is_first[np.unique(values, return_index=True)[1]] = True
    return is_first


def _contradictions(texts: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the places, in order, at which a text gets a label that contradicts an earlier one for the first time.

    Args:
        texts: [n] digests of prompt and completion.
        labels: [n] 1 desirable, 0 undesirable, -1 neither.
    """
    bad, good = (np.flatnonzero(labels == label) for label in (0, 1))
    bad_texts, first_bad = np.unique(texts[bad], return_index=True)
    good_texts, first_good = np.unique(texts[good], return_index=True)
    _, in_bad, in_good = np.intersect1d(bad_texts, good_texts, assume_unique=True, return_indices=True)
    return np.sort(np.maximum(bad[first_bad[in_bad]], good[first_good[in_good]]))


def _reversed(pairs: np.ndarray) -> np.ndarray:
    """Return the places, in order, at which a pair first occurs after its reverse.

    Args:
        pairs: [n, 2] the digests of each pair and of its reverse.
    """
    if not len(pairs):
        return np.zeros(0, dtype=np.int64)
    ways, index = np.unique(pairs[:, 0], return_index=True)
    # A digest that is greater than all others would get a place beyond the end, hence the minimum.
    other = np.minimum(np.searchsorted(ways, pairs[index, 1]), len(ways) - 1)
    is_reversed = (ways[other] == pairs[index, 1]) & (index[other] < index)
    return np.sort(index[is_reversed])


def percentiles(values: Sequence[int] | np.ndarray) -> dict[str, int]:
    """Return percentiles of lengths, ``p100`` for the greatest; each is a length that occurs."""
    if not len(values):
        return {}
    # Not interpolated: a user looks for texts of these lengths.
    lengths = np.percentile(np.asarray(values), PERCENTILES, method="inverted_cdf")
    return {f"p{p}": int(length) for p, length in zip(PERCENTILES, lengths, strict=True)}


def without_leaks(train: Sequence[Record], val: Sequence[Record]) -> tuple[RecordTable, Finding]:
    """Separate the validation records whose prompts are in the training data.

    Prompts that differ only in case, white space or forms of characters count as equal.

    Returns:
        The remaining validation records, and a finding with the leaked ones.
    """
    validation = table_of(val)
    # By the loose digests: a prompt that differs only in case or spaces leaks as much as an equal one.
    leaked = np.isin(validation.numbers("loose_prompt"), table_of(train).numbers("loose_prompt"))
    return validation.take(np.flatnonzero(~leaked)), _finding(validation, np.flatnonzero(leaked))


def origin_of(example_id: str, origins: Iterable[str]) -> str:
    """Return the file that an example comes from; ``(named records)`` if its record came with its own id."""
    files = [file for file in origins if example_id.startswith((f"{file}:", f"{file}["))]
    # The longest match, as one file's name may begin with another's: data and data:test.
    return max(files, key=len, default="(named records)")
