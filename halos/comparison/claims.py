"""Decides the claims of experiments: a sentence, contrasts between runs, and whether they came out as claimed.

An experiment (``conf/experiment/claims_*.yaml``) states its claim in its configuration, so every run carries it. A
contrast is the difference of a metric between two kinds of runs, paired by seed, with Student's t interval over seeds.
It held if the whole interval is above the claimed value, did not hold if the whole interval is at or below it, and is
undecided otherwise. A claim held if all its contrasts did. Intervals are not corrected for the number of contrasts.

Seeds may be added to an experiment until they decide. Looking again and again would find a difference where there is
none more often than one time in twenty, so an experiment says how many looks it allows itself, and each look has its
share of the error (Bonferroni).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from halos.checks import check_whole
from halos.comparison.runs import Run, paired_difference
from halos.config.runs import CONFIG
from halos.config.signatures import check_arguments
from halos.evaluation.statistics import LEVEL, Estimate
from halos.safe_text import markdown

T = TypeVar("T", "Claim", "Contrast", "Figure")
_TYPES = {
    "figure": (Mapping, "keys with values"),
    "contrasts": (list, "a list of contrasts"),
    "lines": (list, "a list of configuration keys"),
    "of": (Mapping, "keys with values"),
    "against": (Mapping, "keys with values"),
    "log": (bool, "true or false"),
    "above": (int | float, "a number"),
    "looks": (int, "a whole number"),
}
"""Types of the fields of a claim in a configuration, and the same in words; others are texts."""
HELD, FAILED, UNDECIDED = "held", "did not hold", "is undecided"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """The difference of a metric between two kinds of runs, claimed to be above a value.

    Attributes:
        at: the contrast in words.
        of: configuration keys and their values (None for a key that is absent) of the runs whose metric is the higher.
        against: keys and values of the runs that they are compared with.
        metric: the name of the metric.
        measure: the metric in words.
        above: the claimed lower bound of the difference.
    """

    at: str
    of: Mapping[str, object]
    against: Mapping[str, object]
    metric: str
    measure: str
    above: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """How a claim is drawn.

    Attributes:
        x: a configuration key or a metric, on the horizontal axis.
        label: the text of that axis.
        lines: configuration keys; each combination of their values has a line.
        log: whether the axis is logarithmic.
    """

    x: str
    label: str
    lines: Sequence[str] = ()
    log: bool = False


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim, as an experiment's configuration states it.

    Attributes:
        name: a short name, part of file names.
        states: the claim as a sentence.
        metric: the metric that its figure shows, and that its contrasts compare where they name none.
        measure: the metric in words.
        figure: how it is drawn.
        contrasts: what has to hold.
        looks: how many times the claim may be decided, each time with more seeds.
    """

    name: str
    states: str
    metric: str
    measure: str
    figure: Figure
    contrasts: Sequence[Contrast]
    looks: int = 1

    @property
    def level(self) -> float:
        """The level of each interval: 1 − 0.05 / looks."""
        return 1 - (1 - LEVEL) / self.looks

    @property
    def image(self) -> str:
        """The name of the file of its figure."""
        return f"claim_{re.sub(r'[^A-Za-z0-9_.-]+', '_', str(self.name))}.png"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of a claim.

    Attributes:
        claim: the claim.
        runs: the runs that carry it.
        differences: the difference of each contrast, None where no seed has both kinds of runs.
    """

    claim: Claim
    runs: list[Run]
    differences: list[Estimate | None]

    @property
    def outcomes(self) -> list[str]:
        """The outcome of each contrast: HELD, FAILED or UNDECIDED."""
        return [_outcome(d, c.above) for c, d in zip(self.claim.contrasts, self.differences, strict=True)]

    @property
    def outcome(self) -> str:
        """The outcome of the whole claim."""
        # One failed contrast refutes the claim, whatever the undecided ones would turn out to be.
        if FAILED in self.outcomes:
            return FAILED
        return UNDECIDED if UNDECIDED in self.outcomes else HELD

    def sentence(self) -> str:
        """The verdict as one sentence with its confidence intervals."""
        triples = zip(self.claim.contrasts, self.differences, self.outcomes, strict=True)
        level = f"{100 * self.claim.level:.3g} %"
        contrasts = "; ".join(f"{one.at}: {_in_words(one, diff, level)} ({outcome})" for one, diff, outcome in triples)
        return f"“{self.claim.states}” {self.outcome} here. {contrasts}."


def decide(runs: Sequence[Run]) -> list[Verdict]:
    """Decide each claim that runs carry.

    Returns:
        A verdict for each claim, in order of first appearance.

    Raises:
        ValueError: a claim is not well formed, runs carry different claims of the same name, or a contrast matches
            several runs of the same seed.
    """
    by_name: dict[str, list[Run]] = {}
    for run in runs:
        if run.claim is not None:
            by_name.setdefault(str(run.claim.get("name")), []).append(run)
    return [_decide(claim_runs) for claim_runs in by_name.values()]


def as_markdown(verdicts: Sequence[Verdict]) -> str:
    """One paragraph for each claim, with its figure below."""
    return "\n".join(f"{markdown(v.sentence())}\n\n![{markdown(v.claim.states)}]({v.claim.image})\n" for v in verdicts)


def _decide(runs: list[Run]) -> Verdict:
    claim = _claim(runs[0])
    # Runs of an older version of the experiment may have been made to decide something else.
    for run in runs:
        if run.claim != runs[0].claim:
            folders, hint = f"{runs[0].folder} and {run.folder}", "compare runs of one version of the experiment"
            raise ValueError(f"claim {claim.name}: {folders} state it differently; {hint}")
    if not all(claim.figure.x in run.config or claim.figure.x in run.numbers for run in runs):
        expected = "a key of the configuration or a metric"
        raise ValueError(f"claim {claim.name}: figure.x: expected {expected}, found {claim.figure.x}")
    return Verdict(claim, runs, [_difference(claim, contrast, runs) for contrast in claim.contrasts])


def _claim(run: Run) -> Claim:
    where = f"{run.folder / CONFIG}: claim"
    claim = _build(where, Claim, run.claim)
    check_whole(f"{where}.looks", claim.looks, 1)
    if not claim.contrasts:
        raise ValueError(f"{where}.contrasts: expected at least one, found none")
    # So far figure and contrasts are nodes of the configuration.
    common = {"metric": claim.metric, "measure": claim.measure}
    contrasts = [_build(f"{where}.contrasts[{n}]", Contrast, node, **common) for n, node in enumerate(claim.contrasts)]
    return replace(claim, figure=_build(f"{where}.figure", Figure, claim.figure), contrasts=contrasts)


def _build(where: str, kind: type[T], node: object, **common: object) -> T:
    """Make a dataclass of a node whose keys are its fields; ``common`` has the values of keys that the node lacks."""
    if not isinstance(node, Mapping):
        raise ValueError(f"{where}: expected keys with values, found {node!r}")
    values = {**common, **node}
    check_arguments(where, kind, **values)
    for name, value in values.items():
        expected_type, expected = _TYPES.get(name, (str, "a text"))
        fits = isinstance(value, expected_type) and (name == "log" or not isinstance(value, bool))
        if not fits or (name == "lines" and not all(isinstance(key, str) for key in value)):
            raise ValueError(f"{where}.{name}: expected {expected}, found {value!r}")
    return kind(**values)


def _difference(claim: Claim, contrast: Contrast, runs: Sequence[Run]) -> Estimate | None:
    of, against = (_by_seed(claim, match, contrast.metric, runs) for match in (contrast.of, contrast.against))
    return paired_difference(of, against, claim.level)


def _by_seed(claim: Claim, match: Mapping[str, object], metric: str, runs: Sequence[Run]) -> dict[int, float]:
    """The metric of the runs whose configuration matches, by seed."""
    # A misspelt key would match runs without it (None) and decide another claim, so it has to be somewhere.
    for key in match:
        if not any(key in run.config for run in runs):
            raise ValueError(f"claim {claim.name}: expected a key of the configuration, found {key}")
    values: dict[int, float] = {}
    for run in runs:
        if any(run.config.get(key) != value for key, value in match.items()):
            continue
        if metric not in run.numbers:
            raise ValueError(f"claim {claim.name}: expected {metric} in the summary of {run.folder}, found none")
        if run.seed in values:
            raise ValueError(f"claim {claim.name}: expected one run of seed {run.seed} with {dict(match)}, found two")
        values[run.seed] = run.numbers[metric]
    return values


def _outcome(difference: Estimate | None, above: float) -> str:
    if difference is None or difference.low is None or difference.high is None:
        return UNDECIDED
    if difference.low > above:
        return HELD
    return FAILED if difference.high <= above else UNDECIDED


def _in_words(contrast: Contrast, difference: Estimate | None, level: str) -> str:
    if difference is None:
        return f"no finished runs to compare the {contrast.measure}"
    interval = "one seed"
    if difference.low is not None:
        interval = f"{level} interval {difference.low:+.3f} to {difference.high:+.3f}, {difference.n} seeds"
    return (
        f"the {contrast.measure} differs by {difference.value:+.3f}, claimed to be above {contrast.above:g}; {interval}"
    )
