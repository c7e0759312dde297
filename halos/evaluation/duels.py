"""Win rates: a judge compares the policy's completions with an opponent's, prompt by prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from halos.data.records.record import Prompt, Record, Reply, prompt_key
from halos.data.views.derive import demonstrations
from halos.evaluation.statistics import Bootstrap, Estimate, sign_flip_p
from halos.judges.base import CompletionJudge

Texts = Sequence[Sequence[Reply]]
"""Completions of each prompt."""
_OUTCOMES = {1.0: "won", 0.5: "tied", 0.0: "lost", None: "without an answer"}


@dataclass(frozen=True, slots=True)
class WinRate:
    """The policy's share of wins over an opponent; a tie counts as half a win.

    Attributes:
        prompts: the number of prompts.
        rate: the share with its interval.
        p_value: the p-value of the sign-flip test that neither side is better, with one difference for each prompt.
        verdicts: one for each duel: 1 if the policy won, 0 if it lost, 0.5 for a tie, None without an answer.
    """

    prompts: int
    rate: Estimate
    p_value: float
    verdicts: list[float | None]

    @property
    def outcomes(self) -> dict[str, int]:
        """How many duels were won, tied, lost, and left without an answer."""
        counts = Counter(_OUTCOMES[verdict] for verdict in self.verdicts)
        return {name: counts[name] for name in _OUTCOMES.values()}

    def as_json(self) -> dict[str, float | None]:
        """The number of prompts, the interval, the p-value and the outcomes of the duels, by name."""
        return {"prompts": self.prompts, **self.rate.as_json(), "p_value": self.p_value, **self.outcomes}


def win_rate(
    judge: CompletionJudge, prompts: Sequence[Prompt], policy: Texts, opponent: Texts, bootstrap: Bootstrap
) -> WinRate:
    """Let the judge compare the n-th completion of the policy with the n-th of the opponent, for each prompt.

    Args:
        judge: decides the duels.
        prompts: the prompts.
        policy: the policy's completions of each prompt, at least one.
        opponent: the opponent's completions of each prompt, at least one. Where one side has fewer than the other,
            its completions are used again from the first.
        bootstrap: makes the interval.

    Raises:
        ValueError: the judge answered no duel.
    """
    duels, groups = [], []
    for group, (prompt, ours, theirs) in enumerate(zip(prompts, policy, opponent, strict=True)):
        for n in range(max(len(ours), len(theirs))):
            duels.append((prompt, ours[n % len(ours)], theirs[n % len(theirs)]))
            groups.append(group)
    verdicts = judge.verdicts(duels)
    # A question without an answer is not a tie: it is left out of the rate.
    answered = [(group, verdict) for group, verdict in zip(groups, verdicts, strict=True) if verdict is not None]
    if not answered:
        raise ValueError(f"judge: expected an answer to at least one of {len(duels)} duels, found none")
    by_group: dict[int, list[float]] = {}
    for group, verdict in answered:
        by_group.setdefault(group, []).append(verdict)
    # Duels of the same prompt are not independent, so the test takes one difference for each prompt.
    differences = [float(np.mean(values)) - 0.5 for values in by_group.values()]
    rate = bootstrap.rate([verdict for _, verdict in answered], [group for group, _ in answered])
    return WinRate(len(prompts), rate, sign_flip_p(differences), verdicts)


def best_of_data(records: Sequence[Record]) -> dict[str, list[Reply]]:
    """Collect the completions of the data to imitate: those that are desirable, chosen or scored best.

    Returns:
        The texts by the key of their prompt, each text once.

    Raises:
        ValueError: there are none.
    """
    # The same choice as supervised fine-tuning makes: its demonstrations are the completions worth imitating.
    try:
        examples = demonstrations(records).examples
    except ValueError as error:
        raise ValueError(f"opponent=data: {error}") from error
    best: dict[str, list[Reply]] = {}
    for example in examples:
        texts = best.setdefault(prompt_key(example.prompt), [])
        if example.completion not in texts:
            texts.append(example.completion)
    return best
