"""From a source to the examples of a view, with an account of everything on the way."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from halos.data.preparation.hygiene import Finding, Hygiene, as_json, examine, files_as_json, percentiles, without_leaks
from halos.data.records.record import Record
from halos.data.records.split import split_by_prompt
from halos.data.records.table import RecordTable, table_of
from halos.data.rows.token_rows import Rows
from halos.data.sources.base import Records, Source
from halos.data.sources.origin import Origin, faults
from halos.data.store.arrow import Store
from halos.data.views.derive import VIEWS
from halos.data.views.examples import Examples
from halos.data.views.selection import Selection
from halos.data.views.turns import expand_turns

LEAKED = "validation records whose prompt is in the training data left out"


@dataclass(slots=True)
class Intake:
    """The examples of each split, counts of what was read, converted and left out, and what is wrong with the data."""

    records: dict[str, RecordTable] = field(default_factory=dict)
    examples: dict[str, Examples[Any]] = field(default_factory=dict)
    reports: dict[str, Counter[str]] = field(default_factory=dict)
    hygiene: dict[str, Hygiene] = field(default_factory=dict)
    origins: dict[str, dict[str, Origin]] = field(default_factory=dict)
    truncated: dict[str, Counter[tuple[str, str]]] = field(default_factory=dict)
    leaks: Finding = field(default_factory=Finding)

    def examine(self) -> None:
        """Look for what is wrong with the records; only a report needs it."""
        self.hygiene = {split: examine(records) for split, records in self.records.items()}

    def tokenised(self, split: str, rows: Rows) -> None:
        """Lengths in tokens and what was cut, once there are rows."""
        self.truncated[split] = rows.truncated
        self.hygiene[split].lengths |= {name: percentiles(values) for name, values in rows.lengths.items()}

    def report(self) -> dict[str, Any]:
        """All of it as plain data."""
        splits = as_json(self.hygiene, self.origins, self.reports, self.truncated)
        if "train" in self.origins and "train" not in splits:  # a stream
            counts = dict(self.reports.get("train", {}))
            splits = {"train": {"files": files_as_json(self.origins["train"]), "counts": counts}} | splits
        return {"splits": splits, "leaked_prompts": {"count": self.leaks.count, "ids": self.leaks.ids}}


def read(source: Source, *, val_size: int, seed: int, strict: bool) -> Intake:
    """The records of both splits; validation records whose prompts are in the training data are left out.

    Raises ``ValueError`` with file and line for bad records, and if ``strict`` for anything left out.
    """
    train, held = source.train(), source.val()
    splits = {"train": train} | ({} if held is None else {"val": held})
    if strict and (found := faults({k: v for records in splits.values() for k, v in records.origins.items()})):
        raise ValueError(f"data.strict: expected nothing to leave out; found {found}")
    if held is None and val_size:
        kept, out = split_by_prompt(train.records, val_size, seed)
        splits = {"train": Records(kept, train.dropped, train.origins), "val": Records(out, Counter())}
    taken = Intake(origins={split: records.origins for split, records in splits.items()})
    for split, records in splits.items():
        taken.records[split] = table_of(records.records)
        taken.reports[split] = Counter({"records": len(records.records)}) + records.dropped
    if "val" in splits:
        _leave_out_leaks(taken, strict)
    return taken


def read_held(source: Source, *, val_size: int, strict: bool) -> tuple[Intake, Sequence[Record]]:
    """What is to be known before a stream is trained on: its validation records, the source's own or the first
    ``val_size`` ones of the stream, and these again as they are.

    Raises ``ValueError`` as :func:`read` does, and if the stream has fewer records than that.
    """
    held = source.val()
    if held is None and val_size:
        held = Records(first_records(source, val_size), Counter())
    taken = Intake(origins={"train": {}})
    if held is None:
        return taken, ()
    if strict and (found := faults(held.origins)):
        raise ValueError(f"data.strict: expected nothing to leave out; found {found}")
    taken.origins["val"] = held.origins
    taken.records["val"] = table_of(held.records)
    taken.reports["val"] = Counter({"records": len(held.records)}) + held.dropped
    return taken, held.records


def first_records(source: Source, count: int) -> list[Record]:
    """The first training records of a stream. Raises ``ValueError`` if it has fewer."""
    found = list(islice(source.stream({}), count))
    if len(found) < count:
        raise ValueError(f"data.val_size: expected at most all {len(found)} records of the stream, found {count}")
    return found


def _leave_out_leaks(taken: Intake, strict: bool) -> None:
    kept, taken.leaks = without_leaks(taken.records["train"], taken.records["val"])
    if not taken.leaks.count:
        return
    where = f"{taken.leaks.count} ({', '.join(taken.leaks.ids)}{', …' if taken.leaks.count > 5 else ''})"
    if strict:
        raise ValueError(f"data.strict: expected validation prompts that are not in the training data; found {where}")
    if not kept:
        raise ValueError(f"expected a validation record whose prompt is not in the training data; found none: {where}")
    taken.records["val"] = kept
    taken.reports["val"][LEAKED] = taken.leaks.count


def derive(
    taken: Intake,
    view: str,
    *,
    selection: Selection,
    most: Mapping[str, int | None],
    train_on: str,
    seed: int,
    store: Store,
) -> None:
    """Make the view's examples of the records, which are let go.

    Raises ``ValueError`` if the view cannot be had from them, or for settings that mean nothing to it.
    """
    selection.check(view)
    if train_on not in ("last", "all"):
        raise ValueError(f"data.train_on: expected last or all, found {train_on!r}")
    if train_on == "all" and view != "demonstrations":
        raise ValueError(
            f"data.train_on=all is for losses that imitate (loss=sft); people judged only the last turn, and this loss "
            f"learns from {view}"
        )
    for split, records in taken.records.items():
        counts: Counter[str] = Counter()
        if train_on == "all":
            records, counts = expand_turns(records, store)
        derived = VIEWS[view](records, selection.prepare(view, records, taken.records.get("train", records)))
        examples: Any = derived.examples
        counts += derived.report
        if split == "train":
            examples, more = selection.keep(examples, seed)
            counts += more
        taken.examples[split] = _at_most(most[split], examples, seed)
        taken.reports[split] += counts
    taken.records = {}


def _at_most(limit: int | None, examples: Examples[Any], seed: int) -> Examples[Any]:
    if limit is None or limit >= len(examples):
        return examples
    return examples.take(np.array(sorted(random.Random(seed).sample(range(len(examples)), limit))))
