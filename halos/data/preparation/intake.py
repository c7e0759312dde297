"""Reads a source's records, and keeps an account of what was read, converted and left out until they are token rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from itertools import islice

from halos.checks import check_whole
from halos.data.preparation.cautions import equal_pairs
from halos.data.preparation.hygiene import Finding, Hygiene, examine, percentiles, without_leaks
from halos.data.records.adapted import NOTED, SHOWN_PLACES, FileCounts, check_faultless
from halos.data.records.split import split_by_prompt
from halos.data.records.table import RecordTable, table_of
from halos.data.rows.tokenise import SplitRows
from halos.data.sources.base import Records, Source
from halos.data.views.examples import Example, Examples
from halos.data.views.joint_examples import JointExamples

LEAKED = "validation records whose prompt is in the training data left out"


@dataclass(slots=True)
class Intake:
    """The data of each split while they become token rows, and an account of what happened to them.

    Attributes:
        records: the records, until examples are derived from them.
        examples: the examples of the view, until they are tokenised; for several views, records with their examples.
        reports: counts of what was read, converted and left out.
        hygiene: duplicates, contradictions and other findings about the records.
        origins: the counts of each file.
        truncated: how often something was cut, by (what was cut, file).
        leaks: validation records whose prompts are in the training data.
    """

    records: dict[str, RecordTable] = field(default_factory=dict)
    examples: dict[str, Examples[Example] | JointExamples] = field(default_factory=dict)
    reports: dict[str, Counter[str]] = field(default_factory=dict)
    hygiene: dict[str, Hygiene] = field(default_factory=dict)
    origins: dict[str, dict[str, FileCounts]] = field(default_factory=dict)
    truncated: dict[str, Counter[tuple[str, str]]] = field(default_factory=dict)
    leaks: Finding = field(default_factory=Finding)

    def examine(self) -> None:
        """Look for duplicates, contradictions and other findings, which only the report needs."""
        self.hygiene = {split: examine(records) for split, records in self.records.items()}

    def tokenised(self, split: str, rows: SplitRows) -> None:
        """Add to the account of a split: lengths in tokens, what was cut, and pairs whose sides have equal tokens."""
        self.truncated[split] = rows.truncated
        findings = [equal_pairs(split, table) for table in rows.table.views]
        self.hygiene[split].equal_pairs = next((finding for finding in findings if finding.count), Finding())
        self.hygiene[split].lengths |= {name: percentiles(values) for name, values in rows.lengths.items()}

    def report(self) -> dict[str, object]:
        """Return the account as plain data, for ``data_report.json``."""
        splits = {split: self._of_split(split) for split in self.origins}
        return {"splits": splits, "leaked_prompts": asdict(self.leaks)}

    def _of_split(self, split: str) -> dict[str, object]:
        files: dict[str, dict[str, object]] = {}
        for file, origin in self.origins[split].items():
            dropped = {why: {"count": count, "ids": origin.places[why]} for why, count in origin.dropped.items()}
            files[file] = {"rows": origin.rows, "records": origin.records, "dropped": dropped}
            if origin.noted:
                files[file]["noted"] = {
                    what: {"count": count, "ids": origin.places[NOTED + what]} for what, count in origin.noted.items()
                }
            if origin.columns:
                files[file]["columns"] = dict(origin.columns)
        account = {"files": files, "counts": dict(self.reports.get(split, {}))}
        if split not in self.hygiene:
            # A stream's training records are counted as they are read, but not examined.
            return account
        cut: dict[str, dict[str, int]] = {}
        for (reason, file), count in self.truncated.get(split, {}).items():
            cut.setdefault(file, {})[reason] = count
        for file, entry in files.items():
            entry["truncated"] = cut.pop(file, {})
        # The rest belongs to records with ids of their own, which do not name a file.
        return asdict(self.hygiene[split]) | account | ({"truncated elsewhere": cut} if cut else {})


def read(source: Source, *, val_size: int, seed: int, strict: bool) -> Intake:
    """Read the records of both splits, and leave out validation records whose prompts are in the training data.

    Args:
        source: the source.
        val_size: records held out of the training data if the source has no validation data.
        seed: the seed of this draw.
        strict: raise an error for faulty records instead of leaving them out.

    Raises:
        ValueError: for bad records; the message names file and line.
    """
    train, val = source.train(), source.val()
    if strict:
        check_faultless(train.origins | ({} if val is None else val.origins))
    if val is None and val_size:
        remaining, held_out = split_by_prompt(train.records, val_size, seed)
        train, val = replace(train, records=remaining), Records(held_out, Counter())
    intake = Intake()
    _take(intake, "train", train)
    if val is not None:
        _take(intake, "val", val)
        _leave_out_leaks(intake, strict)
    return intake


def read_held(source: Source, *, val_size: int, strict: bool) -> Intake:
    """Read the validation records of a stream: the source's own, or the first records of the stream.

    Args:
        source: the source.
        val_size: records taken from the stream if the source has no validation data.
        strict: raise an error for faulty records instead of leaving them out.

    Raises:
        ValueError: for bad records, and if the stream has fewer than ``val_size`` records.
    """
    check_whole("data.val_size", val_size, 0)
    val = source.val()
    if val is None and val_size:
        first = list(islice(source.stream({}), val_size))
        if len(first) < val_size:
            raise ValueError(
                f"data.val_size: expected at most {len(first)}, the records of the stream; found {val_size}"
            )
        val = Records(first, Counter())
    intake = Intake(origins={"train": {}})
    if val is not None:
        if strict:
            check_faultless(val.origins)
        _take(intake, "val", val)
    return intake


def _take(intake: Intake, split: str, records: Records) -> None:
    intake.origins[split] = records.origins
    intake.records[split] = table_of(records.records)
    intake.reports[split] = Counter({"records": len(records.records)}) + records.dropped


def _leave_out_leaks(intake: Intake, strict: bool) -> None:
    remaining, intake.leaks = without_leaks(intake.records["train"], intake.records["val"])
    count, ids = intake.leaks.count, intake.leaks.ids
    if not count:
        return
    leaks = f"{count} ({', '.join(ids)}{', …' if count > SHOWN_PLACES else ''})"
    if strict:
        raise ValueError(f"data.strict: expected validation prompts that are not in the training data; found {leaks}")
    if not remaining:
        raise ValueError(f"data.val: expected a record whose prompt is not in the training data; found none: {leaks}")
    intake.records["val"] = remaining
    intake.reports["val"][LEAKED] = count
