"""Claims that experiments decide: a sentence, contrasts between runs, and whether they came out as claimed.

An experiment (``conf/experiment/claims_*.yaml``) states its claim in its configuration, so every run carries it. A
contrast is the difference of a metric between two sorts of runs, paired by seed, with Student's t interval over seeds;
it held if the whole interval lies above the value claimed, did not hold if none of it does, and is undecided
otherwise. A claim held if all its contrasts did. Intervals are not corrected for the number of contrasts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from halos.comparison.runs import Group, Run, group
from halos.evaluation.statistics import Estimate, over_seeds

HELD, FAILED, UNDECIDED = "held", "did not hold", "is undecided"
_KEYS = {"name", "states", "metric", "measure", "figure", "contrasts"}
_CONTRAST_KEYS = {"at", "of", "against", "above", "metric", "measure"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """``metric`` of the runs that match ``of`` less that of the runs that match ``against`` (configuration keys and
    their values, null for one that is not there) is claimed to lie above ``above``; ``at`` says it in words."""

    at: str
    of: Mapping[str, Any]
    against: Mapping[str, Any]
    metric: str
    measure: str
    above: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """``x``: a configuration key, or a metric; ``lines``: the keys whose values make one line."""

    x: str
    label: str
    lines: tuple[str, ...] = ()
    log: bool = False


@dataclass(frozen=True, slots=True)
class Claim:
    """``states`` is the claim as a sentence; ``metric`` (in words ``measure``) is what its figure shows."""

    name: str
    states: str
    metric: str
    measure: str
    figure: Figure
    contrasts: tuple[Contrast, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came out: for each contrast its difference, None where no seed has both sorts of runs."""

    claim: Claim
    runs: list[Run]
    differences: list[Estimate | None] = field(default_factory=list)

    @property
    def groups(self) -> list[Group]:
        """The claim's runs, those that differ in their seed alone put together."""
        return group(self.runs)

    @property
    def words(self) -> list[str]:
        """What came out, for each contrast."""
        return [_word(d, c.above) for c, d in zip(self.claim.contrasts, self.differences, strict=True)]

    @property
    def word(self) -> str:
        """What came out for the claim as a whole."""
        if FAILED in self.words:
            return FAILED
        return UNDECIDED if UNDECIDED in self.words else HELD

    def sentence(self) -> str:
        """The verdict as one sentence with its confidence intervals."""
        parts = [
            f"{contrast.at}: {_difference(contrast, found)} ({word})"
            for contrast, found, word in zip(self.claim.contrasts, self.differences, self.words, strict=True)
        ]
        return f"“{self.claim.states}” {self.word} here. {'; '.join(parts)}."


def decide(runs: Sequence[Run]) -> list[Verdict]:
    """A verdict for each claim that runs carry, in the order in which they are met.

    Raises ``ValueError`` for a claim that is not well formed, for runs that carry different claims of one name, and for
    a contrast that matches several runs of one seed.
    """
    by_name: dict[str, list[Run]] = {}
    for run in runs:
        if run.claim is not None:
            by_name.setdefault(str(run.claim.get("name")), []).append(run)
    return [_decide(some) for some in by_name.values()]


def as_markdown(verdicts: Sequence[Verdict]) -> str:
    """One paragraph a claim, its figure below it."""
    return "\n".join(f"{v.sentence()}\n\n![{v.claim.states}](claim_{v.claim.name}.png)\n" for v in verdicts)


def _decide(runs: list[Run]) -> Verdict:
    claim = _claim(runs[0])
    for run in runs:
        if run.claim != runs[0].claim:
            raise ValueError(
                f"claim {claim.name}: {runs[0].folder} and {run.folder} state it differently; compare runs of one "
                "version of the experiment"
            )
    if not all(claim.figure.x in run.config or claim.figure.x in run.numbers for run in runs):
        raise ValueError(
            f"claim {claim.name}: figure.x: expected a key of the configuration or a metric, found {claim.figure.x}"
        )
    return Verdict(claim, runs, [_contrast(claim, contrast, runs) for contrast in claim.contrasts])


def _claim(run: Run) -> Claim:
    node = dict(run.claim or {})
    where = f"{run.folder / 'config.yaml'}: claim"
    _check(where, node, _KEYS, _KEYS)
    common = {"metric": node["metric"], "measure": node["measure"]}
    contrasts = []
    for number, contrast in enumerate(node["contrasts"]):
        _check(f"{where}.contrasts[{number}]", contrast, _CONTRAST_KEYS, {"at", "of", "against"})
        contrasts.append(Contrast(**{**common, **contrast}))
    if not contrasts:
        raise ValueError(f"{where}.contrasts: expected at least one, found none")
    _check(f"{where}.figure", node["figure"], {"x", "label", "lines", "log"}, {"x", "label"})
    figure = Figure(**{**node["figure"], "lines": tuple(node["figure"].get("lines", ()))})
    return Claim(node["name"], node["states"], node["metric"], node["measure"], figure, tuple(contrasts))


def _check(where: str, node: Any, known: set[str], needed: set[str]) -> None:
    if not isinstance(node, Mapping) or needed - node.keys() or node.keys() - known:
        found = ", ".join(sorted(map(str, node))) if isinstance(node, Mapping) else repr(node)
        raise ValueError(f"{where}: expected {', '.join(sorted(known))}; found {found}")


def _contrast(claim: Claim, contrast: Contrast, runs: Sequence[Run]) -> Estimate | None:
    ours, theirs = (_by_seed(claim, wanted, contrast.metric, runs) for wanted in (contrast.of, contrast.against))
    both = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    return over_seeds(both) if both else None


def _by_seed(claim: Claim, wanted: Mapping[str, Any], metric: str, runs: Sequence[Run]) -> dict[int, float]:
    for key in wanted:
        if not any(key in run.config for run in runs):
            raise ValueError(f"claim {claim.name}: expected a key of the configuration, found {key}")
    found: dict[int, float] = {}
    for run in runs:
        if any(run.config.get(key) != value for key, value in wanted.items()):
            continue
        if metric not in run.numbers:
            raise ValueError(f"claim {claim.name}: expected {metric} in the summary of {run.folder}, found none")
        if run.seed in found:
            raise ValueError(f"claim {claim.name}: expected one run of seed {run.seed} with {dict(wanted)}, found two")
        found[run.seed] = run.numbers[metric]
    return found


def _word(difference: Estimate | None, above: float) -> str:
    if difference is None or difference.low is None or difference.high is None:
        return UNDECIDED
    if difference.low > above:
        return HELD
    return FAILED if difference.high <= above else UNDECIDED


def _difference(contrast: Contrast, found: Estimate | None) -> str:
    if found is None:
        return f"no finished runs to compare the {contrast.measure}"
    interval = (
        "one seed" if found.low is None else f"95 % interval {found.low:+.3f} to {found.high:+.3f}, {found.n} seeds"
    )
    return f"the {contrast.measure} differs by {found.value:+.3f}, claimed to be above {contrast.above:g}; {interval}"
