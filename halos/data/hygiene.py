"""What is wrong or worth knowing about a data set, before anything is trained on it.

Only digests of texts are kept, so memory grows by some bytes a completion, whatever their length.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from halos.data.feedback import Feedback, Prompt, messages_of, prompt_key
from halos.data.sources import SHOWN_PLACES, Origin

PERCENTILES = (5, 50, 95, 99, 100)


def normalised(text: str) -> str:
    """``text`` in NFKC, lower case and with single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def digest(*parts: str) -> bytes:
    """A key of texts: equal for equal texts."""
    joined = "\x1d".join(parts)
    return hashlib.blake2b(joined.encode("utf-8", "surrogatepass"), digest_size=12).digest()


def normalised_prompt(prompt: Prompt) -> bytes:
    """A key that is equal for prompts that differ in case, white space and forms of characters alone."""
    return digest(*(f"{turn.role}\x1f{normalised(turn.content)}" for turn in messages_of(prompt)))


@dataclass(slots=True)
class Finding:
    """How often something was found, and the first records in which."""

    count: int = 0
    ids: list[str] = field(default_factory=list)

    def add(self, record_id: str) -> None:
        self.count += 1
        if len(self.ids) < SHOWN_PLACES and record_id not in self.ids:
            self.ids.append(record_id)


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


def examine(records: Iterable[Feedback]) -> Hygiene:
    """Go once through the records."""
    found = Hygiene()
    exact: set[bytes] = set()
    near: set[bytes] = set()
    labels: dict[bytes, int] = {}
    pairs: set[bytes] = set()
    sizes: dict[str, list[int]] = {"prompt": [], "completion": []}
    for record in records:
        found.records += 1
        key, loose = prompt_key(record.prompt), normalised_prompt(record.prompt).hex()
        sizes["prompt"].append(sum(len(turn.content) for turn in messages_of(record.prompt)))
        for completion in record.completions:
            found.completions += 1
            sizes["completion"].append(len(completion.text))
            found.scored += completion.score is not None
            text = digest(key, completion.text)
            if completion.desirable is not None:
                found.desirable += completion.desirable
                found.undesirable += not completion.desirable
                _contradiction(found, record.id, labels, text, completion.desirable)
            loosely = digest(loose, normalised(completion.text))
            if text in exact:
                found.duplicates.add(record.id)
            elif loosely in near:
                found.near_duplicates.add(record.id)
            exact.add(text)
            near.add(loosely)
        for better, worse in record.preferences:
            found.preferences += 1
            _preference(found, record, key, pairs, (record.completions[better].text, record.completions[worse].text))
    found.lengths = {f"{name} (characters)": percentiles(values) for name, values in sizes.items()}
    return found


def _contradiction(found: Hygiene, record_id: str, labels: dict[bytes, int], text: bytes, desirable: bool) -> None:
    before = labels.get(text, 0)
    labels[text] = before | (1 if desirable else 2)
    if labels[text] == 3 != before:
        found.contradictions.add(record_id)


def _preference(found: Hygiene, record: Feedback, key: str, pairs: set[bytes], texts: tuple[str, str]) -> None:
    if texts[0] == texts[1]:
        found.identical_pairs.add(record.id)
        return
    if digest(key, *reversed(texts)) in pairs and digest(key, *texts) not in pairs:
        found.contradictory_pairs.add(record.id)
    pairs.add(digest(key, *texts))


def percentiles(values: Sequence[int]) -> dict[str, int]:
    """Percentiles of lengths, the greatest as ``p100``; each is one that occurs."""
    if not values:
        return {}
    found = np.percentile(np.asarray(values), PERCENTILES, method="inverted_cdf")
    return {f"p{p}": int(value) for p, value in zip(PERCENTILES, found, strict=True)}


def without_leaks(train: Iterable[Feedback], val: Sequence[Feedback]) -> tuple[list[Feedback], Finding]:
    """The validation records whose prompts are not in the training data (case, white space and forms of characters do
    not count), and the others."""
    known = {normalised_prompt(record.prompt) for record in train}
    kept, leaks = [], Finding()
    for record in val:
        if normalised_prompt(record.prompt) in known:
            leaks.add(record.id)
        else:
            kept.append(record)
    return kept, leaks


def origin_of(example_id: str, origins: Iterable[str]) -> str:
    """The file that an example comes from, ``(named records)`` where the record had an id of its own."""
    found = [file for file in origins if example_id.startswith((f"{file}:", f"{file}["))]
    return max(found, key=len, default="(named records)")


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
        files = {
            file: {
                "rows": origin.rows,
                "records": origin.records,
                "dropped": {
                    reason: {"count": count, "ids": origin.places[reason]} for reason, count in origin.dropped.items()
                },
                "truncated": cut.pop(file, {}),
            }
            for file, origin in origins[split].items()
        }
        splits[split] = {
            **{name: plain(getattr(found, name)) for name in Hygiene.__slots__},
            "files": files,
            "counts": dict(reports[split]),
            **({"truncated elsewhere": cut} if cut else {}),
        }
    return splits
