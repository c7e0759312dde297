"""What only all rows together tell: scored replies to one prompt in separate rows, and rows whose labels disagree.

Rows are found by the columns of numbers of a record table, so that only the records that change are read again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, NamedTuple

import numpy as np

from halos.data.layouts.votes import DISAGREE, UNDECIDED, VoteRule
from halos.data.records.adapted import FILTERED, NOTED, Adapted
from halos.data.records.record import Record, prompt_key, reply_key
from halos.data.records.table import RecordTable, batches, joined
from halos.data.store.arrow import Part, Store

AVERAGED = f"{NOTED}replies with several scores, of which the mean is used"
COMBINED = f"{FILTERED}rows combined with one that has the same reply and another label (data.votes)"
GROUPS_AT_A_TIME = 128
"""Groups of records that are read together."""


class Group(NamedTuple):
    """Records that become one.

    Attributes:
        kind: ``labels`` of one reply that disagree, or ``scores`` of one prompt's replies.
        indices: their indices in the table, in order.
    """

    kind: Literal["labels", "scores"]
    indices: np.ndarray


class Combined(NamedTuple):
    """The records after some were combined.

    Attributes:
        records: the records.
        counts: for each group, the index of its first record and what was counted.
        removed: the indices of the records that were removed.
    """

    records: RecordTable
    counts: list[tuple[int, Counter[str]]]
    removed: np.ndarray


def scores_in_a_row(adapted: Iterable[Adapted], *, average: bool = False) -> Iterator[Adapted]:
    """Join records that follow each other, have one prompt and one scored completion each.

    Some files have the scored replies to one prompt in separate rows. Joined, they can be compared: pairs of the best
    and the worst reply, or a threshold of each prompt's own.

    Args:
        adapted: the records in their order.
        average: give copies of a reply the mean of their scores, see :func:`averaged`.
    """
    run: list[Adapted] = []
    for one in adapted:
        if run and not _belongs(one[1], run[0][1]):
            yield _joined_run(run, average)
            run = []
        run.append(one)
    if run:
        yield _joined_run(run, average)


def _belongs(record: Record | None, first: Record | None) -> bool:
    if record is None or first is None or not (_is_one_score(record) and _is_one_score(first)):
        return False
    return record.weight == first.weight and prompt_key(record.prompt) == prompt_key(first.prompt)


def _is_one_score(record: Record) -> bool:
    completions = record.completions
    return len(completions) == 1 and completions[0].score is not None and completions[0].desirable is None


def _joined_run(run: Sequence[Adapted], average: bool) -> Adapted:
    where, first, counts = run[0]
    if len(run) == 1 or first is None:
        return run[0]
    records = [record for _, record, _ in run if record]
    counts = sum((count for _, _, count in run[1:]), counts)
    if average:
        return where, averaged(records, counts), +counts
    completions = tuple(completion for record in records for completion in record.completions)
    return where, replace(first, completions=completions), counts


def averaged(records: Sequence[Record], counts: Counter[str]) -> Record:
    """Return one record with all completions; where the same reply has several scores, each copy gets their mean.

    So a reply is never compared with itself, and still counts as often as it was given.
    """
    completions = [completion for record in records for completion in record.completions]
    keys = [reply_key(completion.reply) for completion in completions]
    scores: dict[str, list[float]] = {}
    for key, completion in zip(keys, completions, strict=True):
        scores.setdefault(key, []).append(completion.score or 0.0)
    means = {key: sum(several) / len(several) for key, several in scores.items() if len(set(several)) > 1}
    counts[AVERAGED] += len(means)
    completions = [
        replace(completion, score=means.get(key, completion.score))
        for key, completion in zip(keys, completions, strict=True)
    ]
    return replace(records[0], completions=tuple(completions))


def combine(records: RecordTable, files: np.ndarray, scored: Sequence[bool], votes: VoteRule, store: Store) -> Combined:
    """Combine records that several rows give: labels of one reply that disagree, scored replies to one prompt.

    Args:
        records: all records of a split.
        files: [records] the number of the file that each comes from.
        scored: for each file, whether each of its scored rows has one reply; the scores of different files, and those
            of one row, are not compared.
        votes: how labels that disagree become one.
        store: keeps the combined records.
    """
    groups = [Group("labels", group) for group in _contested(records)]
    if any(scored):
        groups += [Group("scores", group) for group in _of_one_prompt(records, files, np.array(scored)[files])]
    if not groups:
        return Combined(records, [], np.zeros(0, np.int64))
    key = records.key and f"{records.key}-combined"
    combined_table = store.table(key, partial(_part, records, votes), [groups])
    (notes,) = combined_table.notes
    counts = [
        (int(group.indices[0]), Counter[str](count)) for group, count in zip(groups, notes["counts"], strict=True)
    ]
    firsts = [group.indices[0] for group, count in zip(groups, notes["counts"], strict=True) if UNDECIDED not in count]
    # A combined record stands where the first of its rows stood.
    places = np.arange(len(records))
    replaced = np.concatenate([group.indices for group in groups])
    is_left = np.ones(len(records), bool)
    is_left[replaced] = False
    is_left[firsts] = True
    places[firsts] = len(records) + np.arange(len(firsts))
    remaining = joined([records, RecordTable(combined_table)]).take(places[is_left])
    return Combined(remaining, counts, np.flatnonzero(~is_left))


def _part(records: RecordTable, votes: VoteRule, groups: Sequence[Group]) -> Part:
    counts: list[Mapping[str, int]] = []
    yield from batches(_made(records, votes, groups, counts))
    return {"counts": counts}


def _made(
    records: RecordTable, votes: VoteRule, groups: Sequence[Group], counts: list[Mapping[str, int]]
) -> Iterator[tuple[str | None, Record]]:
    for start in range(0, len(groups), GROUPS_AT_A_TIME):
        some = groups[start : start + GROUPS_AT_A_TIME]
        read = iter(records.many(np.concatenate([group.indices for group in some])))
        for group in some:
            members = [next(read) for _ in group.indices]
            count: Counter[str] = Counter()
            one = averaged(members, count) if group.kind == "scores" else _decided(members, votes, count)
            counts.append(dict(+count))
            if one is not None:
                yield records.where(int(group.indices[0])), one


def _decided(records: Sequence[Record], votes: VoteRule, counts: Counter[str]) -> Record | None:
    """Return the record with the label that the rows' labels give as votes, each with the weight of its row."""
    (first, *_), weights = records[0].completions, [record.weight for record in records]
    up = sum(record.weight for record in records if record.completions[0].desirable)
    verdict = votes.verdict(up, sum(weights) - up)
    counts[DISAGREE] += 1
    if verdict is None:
        counts[UNDECIDED] += 1
        return None
    counts[COMBINED] += len(records) - 1
    label, weight = verdict
    completion = replace(first, desirable=label)
    return replace(records[0], completions=(completion,), weight=weight * sum(weights) / len(weights))


def _contested(records: RecordTable) -> list[np.ndarray]:
    """Return the groups of records that have the same reply to the same prompt alone, with labels that disagree."""
    owners, replies = records.lists("completions")
    labels, scores = records.lists("labels")[1], records.lists("scores")[1]
    alone = np.bincount(owners, minlength=len(records))[owners] == 1
    # Labels of steps are of one reply of one row: rows that have some stay apart.
    has_steps = np.isin(owners, records.lists("steps")[0])
    judged = np.flatnonzero(alone & (labels >= 0) & np.isnan(scores) & ~has_steps)
    good, bad = (np.unique(replies[judged[labels[judged] == label]]) for label in (1, 0))
    contested = np.intersect1d(good, bad, assume_unique=True)
    judged = judged[np.isin(replies[judged], contested)]
    return _grouped(owners[judged], replies[judged])


def _of_one_prompt(records: RecordTable, files: np.ndarray, is_scored: np.ndarray) -> list[np.ndarray]:
    """Return the groups of records with scored replies to one prompt in one file, and records that repeat a reply."""
    owners, replies = records.lists("completions")
    has_score = (records.lists("labels")[1] < 0) & ~np.isnan(records.lists("scores")[1])
    judged = np.zeros(len(records), bool)
    judged[records.lists("preferences")[0]] = True
    judged[owners[~has_score]] = True
    indices = np.flatnonzero(is_scored & ~judged)
    weights = records.numbers("weight").view(np.uint64)
    keys = records.numbers("prompt") ^ (files.astype(np.uint64) << np.uint64(32)) ^ weights * np.uint64(3)
    # A row that is alone with its prompt changes only if it repeats a reply.
    order = np.lexsort((replies, owners))
    repeats = (np.diff(owners[order]) == 0) & (np.diff(replies[order]) == 0)
    is_repeating = np.zeros(len(records), bool)
    is_repeating[owners[order][1:][repeats]] = True
    _, inverse, sizes = np.unique(keys[indices], return_inverse=True, return_counts=True)
    indices = indices[(sizes[inverse] > 1) | is_repeating[indices]]
    return _grouped(indices, keys[indices])


def _grouped(indices: np.ndarray, keys: np.ndarray) -> list[np.ndarray]:
    """Return the indices in groups of equal keys, each in order."""
    if not len(indices):
        return []
    order = np.lexsort((indices, keys))
    return np.split(indices[order], np.flatnonzero(np.diff(keys[order])) + 1)
