"""Which losses fit which feedback: a table of rules, each with what it rests on.

The rules are in the order of their kinds of feedback. This is not a ranking: a loss is listed if its rule applies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from halos.data.preparation.facts import Facts

LONGER = 0.6
"""If the longer reply is the chosen one in at least this share of the pairs, people may prefer length."""
BALANCED = (1.0, 4 / 3)
"""Numbers of desirable for each undesirable completion that need no weights (Ethayarajh et al. 2024, first version)."""


@dataclass(frozen=True, slots=True)
class Paper:
    """A paper as evidence: its arXiv number, and where in it."""

    number: str
    where: str = ""

    def __str__(self) -> str:
        return f"arXiv {self.number}{f', {self.where}' * bool(self.where)}"


@dataclass(frozen=True, slots=True)
class Page:
    """A page of docs/ as evidence: its path below docs/, and the result as it stands there."""

    path: str
    result: str

    def __str__(self) -> str:
        return f"docs/{self.path}: {self.result}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What the rules read: the feedback, and what only the user knows.

    Attributes:
        facts: counts of the feedback.
        sft: whether the model was fine-tuned on demonstrations already; None: not stated.
        writer: who wrote the judged replies, ``policy`` or ``others``; None: not stated.
        reference: whether there is a reference model.
    """

    facts: Facts
    sft: bool | None = None
    writer: str | None = None
    reference: bool = True


@dataclass(frozen=True, slots=True)
class Rule:
    """A loss that fits, or something to do.

    Attributes:
        words: settings for the command line; ``{noise:.2g}`` stands for the estimated share of wrong judgements.
        when: returns whether the rule applies to a case.
        because: the reason, with names of facts in braces.
        rests_on: the evidence.
    """

    words: str
    when: Callable[[Case], bool]
    because: str
    rests_on: tuple[Paper | Page, ...]


def _toy(result: str) -> Page:
    return Page("losses/index.md", f"toy world, three runs: {result}")


KTO = "2402.01306"
CLAIMS = "results/claims.md"

RULES = (
    # Labels of single replies
    Rule(
        "loss=kto",
        lambda case: case.facts.labels and case.reference,
        "takes labelled replies: {desirable:,} desirable and {undesirable:,} undesirable",
        (
            Paper(KTO, "section 4.1"),
            Page(CLAIMS, "KTO against DPO on the same pairs +0.046 (−0.018 to +0.111)"),
            _toy("97.8 % desirable (28.6 before), KL 2.92"),
        ),
    ),
    Rule(
        "loss=kto_balanced",
        lambda case: case.facts.labels and case.reference and not _balanced(case.facts),
        "weighs the rarer kind more: {desirable:,} desirable for {undesirable:,} undesirable",
        (
            Paper(KTO, "first version: λ_D n_D / (λ_U n_U) from 1 to 4/3"),
            Page(CLAIMS, "at 10 %, with weights against without: +0.355 (+0.199 to +0.512) (held)"),
        ),
    ),
    Rule(
        "loss=bco",
        lambda case: case.facts.labels and case.reference,
        "takes labelled replies, and its gradient does not vanish for replies far on the wrong side",
        (Paper("2404.04656"), _toy("98.2 % desirable (28.6 before), KL 3.12")),
    ),
    Rule(
        "loss=halo",
        lambda case: case.facts.labels and case.reference,
        "takes labelled replies, with a value function of your own or that of your annotators (fit_value)",
        (Paper(KTO, "section 3"), _toy("95.8 % desirable (28.6 before), KL 2.83")),
    ),
    Rule(
        "loss=dpo",
        lambda case: case.facts.labels and case.facts.both_kinds > 0 and case.reference,
        "makes pairs of replies of both kinds to one prompt: {both_kinds:,} of {prompts:,} prompts have them",
        (Paper("2305.18290", "section 4"), Page(CLAIMS, "KTO against DPO +0.046 (−0.018 to +0.111)")),
    ),
    Rule(
        "loss=csft",
        lambda case: case.facts.labels and not case.reference,
        "takes labelled replies without a reference",
        (
            Paper("2302.08582"),
            Page(CLAIMS, "KTO against CSFT +0.095 (+0.045 to +0.145)"),
        ),
    ),
    Rule(
        "loss=kto_reference_free",
        lambda case: case.facts.labels and not case.reference,
        "takes labelled replies without a reference",
        (Paper(KTO), Page(CLAIMS, "with a reference against without: +0.326 (+0.279 to +0.373)")),
    ),
    # Pairs
    Rule(
        "loss=dpo",
        lambda case: case.facts.pairs > 0 and case.reference,
        "takes {pairs:,} pairs",
        (Paper("2305.18290", "section 4"), _toy("96.6 % desirable (28.6 before), KL 4.14")),
    ),
    Rule(
        "loss=kto",
        lambda case: case.facts.pairs > 0 and not case.facts.labels and case.reference,
        "takes both replies of a pair as labelled ones",
        (Paper(KTO, "section 4.1"), Page(CLAIMS, "against DPO +0.046 (−0.018 to +0.111)")),
    ),
    Rule(
        "loss=robust_dpo loss.label_smoothing={noise:.2g}",
        lambda case: case.facts.pairs > 0 and case.reference and 0 < (case.facts.noise or 0) < 0.5,
        "expects a known share of wrong pairs: {disputed:,} of {repeated:,} repeated judgements are disputed",
        (Paper("2403.00409"), _toy("96.1 % desirable (28.6 before), KL 4.35")),
    ),
    Rule(
        "loss=kto",
        lambda case: case.facts.pairs > 0 and case.reference and case.facts.disputed > 0,
        "its gradient vanishes for replies far on the wrong side, as mislabelled ones are",
        (
            Paper(KTO, "section 4.1"),
            Page(CLAIMS, "against DPO with a fifth of the preferences wrong +0.051 (+0.005 to +0.096)"),
            Page(CLAIMS, "with two fifths wrong +0.216 (+0.033 to +0.400)"),
        ),
    ),
    Rule(
        "loss=ipo",
        lambda case: case.facts.pairs > 0 and case.reference and bool(case.facts.repeated) and not case.facts.disputed,
        "keeps margins finite where people agree: none of {repeated:,} repeated judgements is disputed",
        (Paper("2310.12036"), _toy("98.0 % desirable (28.6 before), KL 2.85")),
    ),
    Rule(
        "loss=r_dpo",
        lambda case: case.facts.pairs > 0 and case.reference and _long(case.facts),
        "asks for less where the chosen reply is the longer one, as in {longer:.0%} of the pairs",
        (Paper("2403.19159"), _toy("96.7 % desirable (28.6 before), KL 4.07")),
    ),
    Rule(
        "loss=ld_dpo",
        lambda case: case.facts.pairs > 0 and case.reference and _long(case.facts),
        "counts tokens beyond the shorter reply less: the chosen one is longer in {longer:.0%} of the pairs",
        (Paper("2409.06411"), _toy("97.5 % desirable (28.6 before), KL 4.42")),
    ),
    Rule(
        "loss=dpo_norm",
        lambda case: case.facts.pairs > 0 and case.reference and _long(case.facts),
        "takes means over tokens: the chosen reply is the longer one in {longer:.0%} of the pairs",
        (Paper("2411.15124", "section 5"), _toy("91.1 % desirable (28.6 before), KL 4.56")),
    ),
    Rule(
        "loss=dpo loss.margin_weight=1",
        lambda case: case.facts.pairs == case.facts.margins > 0 and case.reference,
        "asks for more where people preferred more: all {margins:,} pairs have a margin",
        (Paper("2402.10571"), Page("weights.md", "which is ODPO")),
    ),
    Rule(
        "loss=wpo",
        lambda case: case.facts.pairs > 0 and case.reference and case.writer == "others",
        "weighs pairs that others wrote by how probable they are under the policy",
        (Paper("2406.11827"), _toy("96.0 % desirable (28.6 before), KL 4.05")),
    ),
    Rule(
        "loss=simpo",
        lambda case: case.facts.pairs > 0 and not case.reference,
        "takes pairs without a reference",
        (Paper("2405.14734"), _toy("89.1 % desirable (28.6 before), KL 4.33")),
    ),
    Rule(
        "loss=orpo",
        lambda case: case.facts.pairs > 0 and (not case.reference or case.sft is False),
        "takes pairs without a reference, and imitates the chosen replies in the same run",
        (Paper("2403.07691"), _toy("95.5 % desirable (28.6 before), KL 3.08")),
    ),
    Rule(
        "loss=cpo",
        lambda case: case.facts.pairs > 0 and not case.reference,
        "takes pairs without a reference, and imitates the chosen replies in the same run",
        (Paper("2401.08417"), _toy("96.8 % desirable (28.6 before), KL 3.32")),
    ),
    Rule(
        "loss=bradley_terry",
        lambda case: case.facts.pairs > 0,
        "makes a reward model of the pairs, which scores replies and writes none",
        (Paper("2009.01325", "section 3.4"),),
    ),
    # Scores
    Rule(
        "loss=infonca",
        lambda case: case.facts.score_groups > 0 and case.reference,
        "compares the scored replies to a prompt: {score_groups:,} prompts have different scores",
        (Paper("2402.05369"), _toy("97.6 % desirable (28.6 before), KL 2.94")),
    ),
    Rule(
        "loss=dpo",
        lambda case: case.facts.score_groups > 0 and not case.facts.pairs and case.reference,
        "pairs the best with the worst reply of {score_groups:,} prompts (data.select.pairs_from_scores)",
        (Paper("2305.18290", "section 4"), _toy("96.6 % desirable (28.6 before), KL 4.14")),
    ),
    Rule(
        "loss=grpo",
        lambda case: case.facts.score_groups > 0 and case.reference and case.writer == "policy",
        "compares a score with those of the other replies to its prompt, where the reference wrote the replies",
        (Paper("2402.03300", "section 4.1.2"), _toy("62.4 % desirable (28.6 before), KL 0.59")),
    ),
    Rule(
        "loss=ppo",
        lambda case: case.facts.scored > 0 and case.reference and case.writer == "policy",
        "learns a baseline of the scores, where the reference wrote the replies",
        (Paper("1707.06347"), Paper(KTO, "section 3 (offline)"), _toy("62.7 % desirable (28.6 before), KL 0.56")),
    ),
    Rule(
        "loss=kto data.select.labels_from_scores=median",
        lambda case: case.facts.scored > 0 and not case.facts.labels and case.reference,
        "takes replies above the median of {scored:,} scores as desirable, and those below it as undesirable",
        (Paper(KTO, "section 4.1"), _toy("97.8 % desirable (28.6 before), KL 2.92, from labels")),
    ),
    # Labels of steps
    Rule(
        "loss=step_kto",
        lambda case: case.facts.steps > 0 and case.reference,
        "takes {steps:,} labelled steps of replies as examples, beside the replies that have a label",
        (Paper("2501.10799"),),
    ),
    # Several kinds of feedback in one step
    Rule(
        "loss=mix +loss.parts.kto._target_=halos.objectives.KTO +loss.parts.kto._partial_=true +loss.weights.kto=0.5 "
        "~loss.parts.sft ~loss.weights.sft",
        lambda case: case.facts.pairs > 0 and case.facts.labels and case.reference,
        "learns from {pairs:,} pairs and from the labels of other replies in the same step",
        (
            Page("guides/mixtures.md", "DPO can learn from the pairs of the data and KTO from the labels"),
            Paper("2411.10442", "which sums a loss of pairs and one of single replies"),
        ),
    ),
    Rule(
        "loss=mix",
        lambda case: case.facts.pairs > 0 and case.facts.bare > 0 and case.reference,
        "learns from {pairs:,} pairs, and imitates chosen replies and {bare:,} demonstrations in the same step",
        (_toy("96.8 % desirable (28.6 before), KL 3.97, of pairs and their chosen replies"),),
    ),
    # Replies to imitate
    Rule(
        "loss=sft",
        lambda case: case.facts.bare > 0 or (case.facts.desirable > 0 and not case.facts.undesirable),
        "imitates {imitated:,} replies that nobody compared or rejected",
        (Page(CLAIMS, "KTO against SFT on the chosen replies −0.068 (−0.116 to −0.020)"),),
    ),
)
"""The losses by the feedback that they take."""

STEPS = (
    Rule(
        "before=sft",
        lambda case: case.sft is False and (case.facts.labels or case.facts.pairs > 0),
        "trains on the desirable or chosen replies first; whether KTO and DPO need it is undecided in the toy world",
        (
            Page(CLAIMS, "KTO without SFT against KTO after SFT: −0.037 (−0.131 to +0.056) (undecided)"),
            Page(CLAIMS, "DPO after SFT against DPO without: +0.083 (−0.019 to +0.186) (undecided)"),
        ),
    ),
)
"""What to add to a loss's words."""


def fitting(case: Case, rules: tuple[Rule, ...] = RULES) -> dict[str, list[tuple[str, Rule]]]:
    """Return the words that fit a case, each with the rules that apply and their reasons."""
    facts = case.facts
    names = {name: getattr(facts, name) for name in Facts.__dataclass_fields__}
    names |= {"noise": facts.noise, "imitated": facts.bare + facts.desirable}
    rules_by_words: dict[str, list[tuple[str, Rule]]] = {}
    for rule in rules:
        if rule.when(case):
            rules_by_words.setdefault(rule.words.format(**names), []).append((rule.because.format(**names), rule))
    return rules_by_words


def _balanced(facts: Facts) -> bool:
    low, high = BALANCED
    return low <= facts.desirable / facts.undesirable <= high


def _long(facts: Facts) -> bool:
    return facts.longer is not None and facts.longer >= LONGER
