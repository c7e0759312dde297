"""Selects the feedback to use: labels and pairs from scores, imbalance, one completion per prompt.

Scores become labels and pairs before the view is derived. The examples to keep are drawn from the view's training
examples. Each step exists for a data set that is known whole and for a run of a stream; both forms share one rule.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, combinations, pairwise

import numpy as np

from halos.checks import check_number, check_share, is_number
from halos.data.records.judgement import Judgement
from halos.data.records.record import Record, prompt_key
from halos.data.records.table import RecordTable, digest, table_of
from halos.data.views.derive import Prepare
from halos.data.views.examples import E, Examples, Labelled

Threshold = Callable[[int], float | None]
"""Maps the index of a record to the score that separates its labels; None where there is no score."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The settings of ``data.select``.

    Args:
        keep_desirable: share of the desirable training completions that is kept (the KTO paper drops up to 90 % of
            them, section 4.2 of its first version).
        keep_undesirable: share of the undesirable training completions that is kept.
        one_per_prompt: keep one training example of each prompt (the paper's "one y per x").
        labels_from_scores: a completion without a label is desirable if it scores above this, undesirable below it,
            and stays without a label at just this score. A number, ``median`` (of all training scores) or ``prompt``
            (the median of its own prompt's scores).
        pairs_from_scores: which completions of a record that have only scores are paired: ``best_worst`` pairs the
            best with the worst, ``all`` every two.
        min_margin: the smallest difference of scores in such a pair; equal scores never make one.

    Raises:
        ValueError: for a setting out of its range.
    """

    keep_desirable: float = 1.0
    keep_undesirable: float = 1.0
    one_per_prompt: bool = False
    labels_from_scores: float | str | None = None
    pairs_from_scores: str = "best_worst"
    min_margin: float = 0.0

    def __post_init__(self) -> None:
        check_share("data.select.keep_desirable", self.keep_desirable)
        check_share("data.select.keep_undesirable", self.keep_undesirable)
        threshold = self.labels_from_scores
        if threshold not in (None, "median", "prompt") and not (is_number(threshold) and math.isfinite(threshold)):
            accepted = "a number, median, prompt or null"
            raise ValueError(f"data.select.labels_from_scores: expected {accepted}, found {threshold!r}")
        pairing = self.pairs_from_scores
        if pairing not in ("best_worst", "all"):
            raise ValueError(f"data.select.pairs_from_scores: expected best_worst or all, found {pairing!r}")
        check_number("data.select.min_margin", self.min_margin)

    def check(self, *views: str) -> None:
        """Raise ``ValueError`` for settings that have no effect on any of the views."""
        if "binary" not in views and (self.keep_desirable < 1 or self.keep_undesirable < 1):
            raise ValueError(
                "data.select.keep_desirable and keep_undesirable are for losses that learn from labels; "
                f"this one learns from {' and '.join(views)}"
            )

    def check_stream(self) -> None:
        """Raise ``ValueError`` for settings that need the whole data set at once."""
        if self.labels_from_scores == "median":
            raise ValueError(
                "data.select.labels_from_scores: expected a number or prompt with data.streaming=true, found median, "
                "which is that of all training scores"
            )

    def prepare(self, view: str, records: Sequence[Record], training: Sequence[Record]) -> Prepare | None:
        """Return how scores become labels (binary view) or pairs (pairs view), None if they do not.

        Args:
            view: the view that is derived afterwards.
            records: the records that it is derived from.
            training: the records whose median score is the threshold of ``labels_from_scores=median``.
        """
        return self._prepare(view, lambda: self._threshold(records, training))

    def prepare_run(self, view: str, run: Sequence[Record]) -> Prepare | None:
        """Return what :meth:`prepare` does, for the records of a stream that have one prompt and follow each other."""
        return self._prepare(view, lambda: self._threshold_of_run(run))

    def _prepare(self, view: str, threshold_of: Callable[[], Threshold]) -> Prepare | None:
        if view == "binary" and self.labels_from_scores is not None:
            threshold = threshold_of()
            return lambda index, judgement: _label_by_score(judgement, threshold(index))
        if view == "pairs" and (self.pairs_from_scores == "all" or self.min_margin):
            return lambda _, judgement: self._pair_by_score(judgement)
        return None

    def keep(self, examples: Examples[E], seed: int) -> tuple[Examples[E], Counter[str]]:
        """Draw the training examples that are kept.

        Exactly the given share of each label is kept, and at least one example of it.

        Returns:
            The kept examples in their order, and counts of the others.
        """
        draws = partial(_draws, seed, examples.names, examples.number)
        is_kept, report = self._keep(examples.labels, examples.prompts, draws, exactly=True)
        return (examples if is_kept.all() else examples.take(np.flatnonzero(is_kept))), report

    def keep_of_run(self, examples: Sequence[E], seed: int) -> tuple[list[E], Counter[str]]:
        """Draw the examples to keep, from a few consecutive examples of a stream.

        The draws are the same as in :meth:`keep`. As the number of examples in a stream is not known, the shares hold
        only on average.

        Returns:
            The kept examples in their order, and counts of the others.
        """
        everything = not self.one_per_prompt and self.keep_desirable == self.keep_undesirable == 1
        if everything or not examples:
            return list(examples), Counter()
        labels = [example.desirable if isinstance(example, Labelled) else True for example in examples]
        prompts = np.array([digest(prompt_key(example.prompt)) for example in examples], dtype=np.uint64)
        # The same numbers as the table has in its columns: the digest of the record's id, and the number after the "#".
        ids = [example.id.rpartition("#") for example in examples]
        names = np.array([digest(record_id) for record_id, _, _ in ids], dtype=np.uint64)
        draws = partial(_draws, seed, names, np.array([int(number) for _, _, number in ids]))
        is_kept, report = self._keep(np.array(labels), prompts, draws, exactly=False)
        return [examples[place] for place in np.flatnonzero(is_kept).tolist()], report

    def _keep(
        self, labels: np.ndarray | None, prompts: np.ndarray, draws: Callable[[str], np.ndarray], *, exactly: bool
    ) -> tuple[np.ndarray, Counter[str]]:
        """Return whether each example is kept, [n], and counts of the others.

        Args:
            labels: [n] whether each is desirable; None if examples have no labels.
            prompts: [n] equal numbers for equal prompts.
            draws: returns, for a purpose, a random number for each example, [n]; the lowest ones are kept.
            exactly: keep exactly the share of these examples; False: keep draws below the share of their range.
        """
        report: Counter[str] = Counter()
        is_kept = np.ones(len(prompts), dtype=bool)
        for desirable, share in ((True, self.keep_desirable), (False, self.keep_undesirable)):
            if share == 1 or labels is None:
                continue
            of_kind = np.flatnonzero(labels == desirable)
            drawn = draws("share")[of_kind]
            # A table keeps exactly its share, the lowest draws. A stream cannot know how many examples will come, so
            # it keeps the draws below a bar. Both keep the same examples, except for the few around the bar.
            count = max(1, round(share * len(of_kind))) if exactly else int((drawn < share * 2.0**64).sum())
            dropped = of_kind[np.argsort(drawn, kind="stable")[count:]]
            is_kept[dropped] = False
            report[f"{'desirable' if desirable else 'undesirable'} completions not kept"] += len(dropped)
        if self.one_per_prompt:
            remaining = np.flatnonzero(is_kept)
            # New draws: those of the shares would favour the label with the smaller share, which keeps only low ones.
            order = remaining[np.argsort(draws("one")[remaining], kind="stable")]
            # In the order of the draws, the first example of each prompt is the one with its lowest draw.
            _, first = np.unique(prompts[order], return_index=True)
            is_kept[:] = False
            is_kept[order[first]] = True
            report["further examples of a prompt not kept"] += len(remaining) - len(first)
        return is_kept, +report

    def _threshold(self, records: Sequence[Record], training: Sequence[Record]) -> Threshold:
        setting = self.labels_from_scores
        if setting == "prompt":
            table = table_of(records)
            owner, scores, weights = _scores(table)
            prompts, member = np.unique(table.numbers("prompt"), return_inverse=True)
            medians = _medians(member[owner], scores, weights, len(prompts))
            return lambda index: medians[member[index]]
        one_for_all = _median(*_scores(table_of(training))[1:]) if isinstance(setting, str) else setting
        return lambda _: one_for_all

    def _threshold_of_run(self, run: Sequence[Record]) -> Threshold:
        setting = self.labels_from_scores
        if isinstance(setting, str):
            # Without a table, which would be made for each run of perhaps millions.
            scored = [(c.score, record.weight) for record in run for c in record.completions if c.score is not None]
            setting = _median(*np.array(scored, dtype=np.float64).reshape(-1, 2).T)
        return lambda _: setting

    def _pair_by_score(self, record: Judgement) -> tuple[Judgement, Counter[str]]:
        """Add preferences between completions that have only scores; leave out those that are too close to all."""
        report: Counter[str] = Counter()
        in_pairs = set(chain(*record.preferences))
        alone = [i for i, c in enumerate(record.completions) if i not in in_pairs and c.desirable is None]
        scores = {i: score for i in alone if (score := record.completions[i].score) is not None}
        ranked = sorted(scores, key=lambda i: (-scores[i], i))
        # With equal scores the earlier completion ranks first, as in the rule without a selection.
        couples = list(combinations(ranked, 2))
        if couples and self.pairs_from_scores == "best_worst":
            couples = [(ranked[0], ranked[-1])]
        preferred = [(i, j) for i, j in couples if scores[i] > scores[j] and scores[i] - scores[j] >= self.min_margin]
        too_close = set(ranked).difference(chain(*preferred))
        report["pairs from scores"] += len(preferred)
        report["completions with close scores left out"] += len(too_close)
        remaining = [i for i in range(len(record.completions)) if i not in too_close]
        position = {old: new for new, old in enumerate(remaining)}
        preferences = tuple((position[i], position[j]) for i, j in (*record.preferences, *preferred))
        return Judgement(tuple(record.completions[i] for i in remaining), preferences), report


def _draws(seed: int, names: np.ndarray, numbers: np.ndarray, purpose: str) -> np.ndarray:
    """Draw a number from 0 to 2**64 for each example, [n], that depends on seed, purpose and the example's id alone.

    A draw depends neither on the order of the data nor on the other examples.

    Args:
        seed: the seed of the run.
        names: [n] digests of the ids of the examples' records.
        numbers: [n] numbers of the examples in their records.
        purpose: draws for different purposes are independent.
    """
    key = np.uint64(digest(purpose, str(seed)))
    return _mixed(_mixed(names ^ key) + numbers.astype(np.uint64))


def _mixed(bits: np.ndarray) -> np.ndarray:
    """Mix 64-bit numbers, [n], by the finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(bits ^ (bits >> np.uint64(31)))


def _label_by_score(record: Judgement, threshold: float | None) -> tuple[Judgement, Counter[str]]:
    completions, report = list(record.completions), Counter[str]()
    for place, completion in enumerate(record.completions):
        score = completion.score
        if threshold is not None and score is not None and completion.desirable is None and score != threshold:
            completions[place] = replace(completion, desirable=score > threshold)
            report[f"{'desirable' if score > threshold else 'undesirable'} by their scores"] += 1
    return replace(record, completions=tuple(completions)), report


def _scores(records: RecordTable) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (the index of the record of each, the scores, the weights) of all completions that have a score."""
    owner, scores = records.lists("scores")
    known = ~np.isnan(scores)
    return owner[known], scores[known], records.numbers("weight")[owner[known]]


def _medians(groups: np.ndarray, values: np.ndarray, weights: np.ndarray, count: int) -> list[float | None]:
    """Return the median of the values of each of ``count`` groups, None for a group without values."""
    order = np.lexsort((values, groups))
    edges = np.searchsorted(groups[order], np.arange(count + 1))
    return [_median(values[order[a:z]], weights[order[a:z]]) for a, z in pairwise(edges)]


def _median(scores: np.ndarray, weights: np.ndarray) -> float | None:
    """Return the median of scores that each count by their weight; with whole numbers, as if repeated that often."""
    if not len(scores):
        return None
    order = np.argsort(scores, kind="stable")
    up_to = np.cumsum(weights[order])
    # The two middle scores differ where exactly half of the weight is below.
    middle = [order[np.searchsorted(up_to, up_to[-1] / 2, side)] for side in ("left", "right")]
    return float(scores[middle].sum() / 2)
