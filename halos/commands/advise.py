"""``advise(cfg)``: counts feedback, and lists the losses that fit it, with the evidence. It reads no model."""

import shlex
from collections.abc import Iterator, Sequence

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from halos.checks import check_choice
from halos.commands.advice import STEPS, Case, Rule, fitting
from halos.commands.inspect_data import preparation_of
from halos.data.preparation.facts import Facts, facts_of
from halos.terminal import console, say, set_up_logging, styled

OWN = ("sft", "writer", "reference", "seed")
"""Keys that only this command has, or that have another meaning in a run."""


def advise(cfg: DictConfig) -> list[str]:
    """Read the data, print counts of them and the losses that fit.

    Returns:
        The settings for each loss that fits, in the order of the rules.

    Raises:
        ValueError: bad data or settings.
    """
    set_up_logging(models=False)
    for key in ("sft", "reference"):
        if not isinstance(cfg[key], bool) and not (key == "sft" and cfg[key] is None):
            raise ValueError(f"{key}: expected true or false{' or null' * (key == 'sft')}, found {cfg[key]!r}")
    if cfg.writer is not None:
        check_choice("writer", cfg.writer, ("policy", "others"))
    if cfg.data.streaming:
        raise ValueError("data.streaming: expected false, as all feedback is counted; found true")
    case = Case(facts=facts_of(preparation_of(cfg).read()), sft=cfg.sft, writer=cfg.writer, reference=cfg.reference)
    for label, text in described(case):
        say(f"{label:<9}{text}")
    losses = fitting(case)
    say("")
    if not losses:
        say("No loss fits: expected labels of both kinds, pairs, scores, or replies to imitate.")
        return []
    say("Losses that take these data. The order is fixed and is not a ranking.")
    rest = [*_data_words(), *(["model.path=MODEL"] if cfg.data.get("train") else [])]
    for words, reasons in losses.items():
        _show(words, reasons)
        say(f"  python scripts/train.py {' '.join([words, *rest])}")
    for words, reasons in fitting(case, STEPS).items():
        _show(f"{words}, next to the words of a loss", reasons)
    return list(losses)


def _show(words: str, reasons: Sequence[tuple[str, Rule]]) -> None:
    console.print(styled((words, "bold")), soft_wrap=True)
    for because, rule in reasons:
        say(f"  {because}")
        for source in rule.rests_on:
            say(f"    {source}")


def described(case: Case) -> Iterator[tuple[str, str]]:
    """Yield lines about the feedback, each with its label."""
    facts = case.facts
    yield "data", f"{facts.records:,} records: {facts.completions:,} replies to {facts.prompts:,} prompts"
    yield "feedback", ", ".join(_kinds(facts)) or "none"
    if facts.completions > facts.bare:
        yield "prompts", f"{facts.alone:,} with one judged reply, {facts.prompts - facts.alone:,} with several or none"
    if facts.desirable or facts.undesirable:
        low, high = sorted((facts.desirable, facts.undesirable))
        yield "balance", f"1 to {high / low:.2g}" if low else f"all of one kind: {facts.desirable:,} desirable"
    if facts.judgements:
        yield "noise", "; ".join(_noise(facts))
    if facts.longer is not None:
        what = "chosen reply of a pair" if facts.pairs else "desirable one of two replies"
        yield "lengths", f"the {what} is the longer one in {facts.longer:.0%} (a tie counts half)"
    sft = {True: "done", False: "not done", None: "not stated (sft=true or false)"}[case.sft]
    writer = f"by {case.writer}" if case.writer else "by whom is not stated (writer=policy or others)"
    yield "stated", f"SFT {sft}; replies {writer}; {'a' if case.reference else 'no'} reference"


def _kinds(facts: Facts) -> Iterator[str]:
    if facts.desirable or facts.undesirable:
        yield f"{facts.desirable:,} desirable and {facts.undesirable:,} undesirable"
    if facts.pairs:
        yield f"{facts.pairs:,} pairs{f', {facts.margins:,} with a margin' * bool(facts.margins)}"
    if facts.scored:
        yield f"{facts.scored:,} scores, different ones for {facts.score_groups:,} prompts"
    if facts.steps:
        yield f"{facts.steps:,} labels of steps"
    if facts.bare:
        yield f"{facts.bare:,} replies without a judgement (demonstrations)"


def _noise(facts: Facts) -> Iterator[str]:
    if facts.disputed:
        # Of two answers to one question at least one is wrong.
        share = f"{facts.disputed:,} of {facts.judgements:,} judgements ({facts.disputed / facts.judgements:.1%})"
        yield f"at least {share} are wrong if each question has one right answer"
    if facts.noise is None:
        votes = "the data have counts of votes, so the number of repeated judgements is not known"
        yield votes if facts.repeated is None else "no judgement is repeated, so contradictions give no bound"
        return
    low, high = facts.noise_interval
    repeated = f"{facts.disputed:,} of {facts.repeated:,} repeated ones were answered both ways"
    wrong = f"each is wrong with probability {facts.noise:.2g} ({low:.2g} to {high:.2g})"
    yield f"{repeated}: {wrong} if errors are independent"


def _data_words() -> list[str]:
    """Return the words of the command line that a run also takes."""
    if not HydraConfig.initialized():
        return []
    words = HydraConfig.get().overrides.task
    return [shlex.quote(word) for word in words if word.partition("=")[0].lstrip("+") not in OWN]
