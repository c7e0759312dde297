"""What feedback consists of, in the numbers by which a loss is chosen. No text is read for them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from halos.data.layouts.votes import DISAGREE
from halos.data.preparation.intake import Intake
from halos.data.records.adapted import NOTED, FileCounts
from halos.data.records.table import RecordTable
from halos.data.sources.combined import COMBINED


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """The feedback of one split, counted.

    Attributes:
        records, prompts, completions: numbers of records, of different prompts, and of completions.
        desirable, undesirable: numbers of completions with this label.
        pairs: number of preferences.
        scored: number of completions with a score.
        steps: number of labelled steps of completions.
        bare: number of completions without label, score, preference and labels of steps.
        both_kinds: prompts with desirable and undesirable completions.
        alone: prompts with one judged completion.
        score_groups: prompts with different scores.
        margins: preferences with a margin.
        longer: how often the preferred completion is the longer one, in characters, or a desirable one than an
            undesirable one; a tie counts half. None where there is nothing to compare.
        judgements: labels and preferences that were given, before some were combined.
        repeated: judgements of one completion, or of one pair, that were given more than once; None where votes are
            counted in a column, so that it is not known.
        disputed: of these, the number with both answers.
    """

    records: int = 0
    prompts: int = 0
    completions: int = 0
    desirable: int = 0
    undesirable: int = 0
    pairs: int = 0
    scored: int = 0
    steps: int = 0
    bare: int = 0
    both_kinds: int = 0
    alone: int = 0
    score_groups: int = 0
    margins: int = 0
    longer: float | None = None
    judgements: int = 0
    repeated: int | None = 0
    disputed: int = 0

    @property
    def labels(self) -> bool:
        """Whether there are labels of both kinds."""
        return bool(self.desirable and self.undesirable)

    @property
    def noise(self) -> float | None:
        """The probability ε of a wrong judgement, where two of the same thing differ with probability 2 ε (1 − ε).

        It is too high where things were judged more than twice.
        """
        return _error_rate(self.disputed / self.repeated) if self.repeated else None

    @property
    def noise_interval(self) -> tuple[float, float]:
        """The 95 % interval of :attr:`noise`, from Wilson's (1927) for the share of disputed judgements."""
        count = self.repeated or 0
        if not count:
            return 0.0, 0.5
        share, z2 = self.disputed / count, 1.959964**2
        centre = (share + z2 / (2 * count)) / (1 + z2 / count)
        half = math.sqrt(z2 * share * (1 - share) / count + z2**2 / (4 * count**2)) / (1 + z2 / count)
        return _error_rate(centre - half), _error_rate(centre + half)


def _error_rate(disputed: float) -> float:
    # At most 1/2, where two answers agree by chance alone.
    return (1 - math.sqrt(min(1.0, max(0.0, 1 - 2 * disputed)))) / 2


def facts_of(intake: Intake, split: str = "train") -> Facts:
    """Count the feedback of a split."""
    table, origins = intake.records[split], intake.origins[split].values()
    owners, replies = table.lists("completions")
    labels, scores = table.lists("labels")[1], table.lists("scores")[1]
    sides = _sides(table, owners)
    judged = (labels >= 0) | ~np.isnan(scores)
    judged[sides.ravel()] = True
    of_steps, numbers = table.lists("steps")
    stepped, _, step_labels = (numbers[place::3] for place in range(3))
    judged[np.searchsorted(owners, of_steps[::3]) + stepped] = True
    prompts = table.numbers("prompt")[owners]
    good, bad = prompts[labels == 1], prompts[labels == 0]
    combined = sum(origin.dropped[COMBINED] for origin in origins)
    repeated, disputed = _repeated(table, replies, labels, origins)
    return Facts(
        records=len(table),
        prompts=len(np.unique(prompts)),
        completions=len(replies),
        desirable=len(good),
        undesirable=len(bad),
        pairs=len(sides),
        scored=int((~np.isnan(scores)).sum()),
        steps=int((step_labels >= 0).sum()),
        bare=int((~judged).sum()),
        both_kinds=len(np.intersect1d(good, bad)),
        alone=int((np.unique(prompts[judged], return_counts=True)[1] == 1).sum()),
        score_groups=_different(prompts, scores),
        margins=int((~np.isnan(table.numbers("margin")[owners[sides[:, 0]]])).sum()),
        longer=_longer(table.lists("completion_characters")[1], labels, sides),
        judgements=len(good) + len(bad) + len(sides) + combined,
        repeated=repeated,
        disputed=disputed,
    )


def _sides(table: RecordTable, owners: np.ndarray) -> np.ndarray:
    """Return the places of the better and the worse completion of each preference among all completions, [pairs, 2]."""
    starts = np.searchsorted(owners, np.arange(len(table)))
    preferring, places = table.lists("preferences")
    return np.asarray(starts[preferring] + places, dtype=np.int64).reshape(-1, 2)


def _different(prompts: np.ndarray, scores: np.ndarray) -> int:
    """Return the number of prompts whose completions have different scores."""
    order = np.lexsort((scores, prompts))
    order = order[~np.isnan(scores[order])]
    prompts, scores = prompts[order], scores[order]
    differ = (prompts[1:] == prompts[:-1]) & (scores[1:] != scores[:-1])
    return len(np.unique(prompts[1:][differ]))


def _longer(characters: np.ndarray, labels: np.ndarray, sides: np.ndarray) -> float | None:
    if len(sides):
        better, worse = characters[sides].T
        return float(((better > worse) + 0.5 * (better == worse)).mean())
    good, bad = characters[labels == 1], np.sort(characters[labels == 0])
    if not len(good) or not len(bad):
        return None
    below, up_to = (np.searchsorted(bad, good, side=side) for side in ("left", "right"))
    return float((below + up_to).mean() / 2 / len(bad))


def _repeated(
    table: RecordTable, replies: np.ndarray, labels: np.ndarray, origins: Iterable[FileCounts]
) -> tuple[int | None, int]:
    """Return how many completions and pairs were judged more than once, and how many of them both ways."""
    ways = table.lists("pairs")[1].reshape(-1, 2)
    ways = ways[ways[:, 0] != 0]  # a pair of equal texts
    of_pairs = _judged_again(ways.min(axis=1), ways[:, 0] < ways[:, 1])
    of_labels = _judged_again(replies[labels >= 0], labels[labels >= 0] == 1)
    # Rows that disagree about one completion have become one record, and are only counted.
    settled = sum(origin.noted[DISAGREE.removeprefix(NOTED)] for origin in origins)
    voted = any(column.endswith(": votes") for origin in origins for column in origin.columns)
    repeated = of_pairs[0] + of_labels[0] + settled
    return None if voted else repeated, of_pairs[1] + of_labels[1] + settled


def _judged_again(subjects: np.ndarray, answers: np.ndarray) -> tuple[int, int]:
    """Return how many subjects have several answers, and how many have both.

    Args:
        subjects: [n] a digest of what each answer is about.
        answers: [n] bool.
    """
    _, subject, counts = np.unique(subjects, return_inverse=True, return_counts=True)
    positive = np.bincount(subject, answers, len(counts))
    return int((counts > 1).sum()), int(((positive > 0) & (positive < counts)).sum())
