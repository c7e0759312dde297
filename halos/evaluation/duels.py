"""Win rates: a judge compares the policy's completions with somebody else's, prompt by prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from halos.data.records.record import Prompt, Record, prompt_key
from halos.data.views.derive import demonstrations
from halos.evaluation.statistics import Estimate, rate, sign_flip_p
from halos.judges.base import CompletionJudge


@dataclass(frozen=True, slots=True)
class WinRate:
    """The policy's share of wins, a tie counting half, and the p-value of there being no difference.

    ``verdicts`` [duels]: 1 for the policy, 0 against it, 0.5 for a tie, None where the judge gave no answer.
    """

    rate: Estimate
    p_value: float
    verdicts: list[float | None]

    def as_json(self) -> dict[str, Any]:
        """The interval, the test, and how the duels ended."""
        names = {1.0: "won", 0.5: "tied", 0.0: "lost", None: "without an answer"}
        ended = Counter(names[verdict] for verdict in self.verdicts)
        return {**self.rate.as_json(), "p_value": self.p_value, **{name: ended[name] for name in names.values()}}


def win_rate(
    judge: CompletionJudge,
    prompts: Sequence[Prompt],
    policy: Sequence[Sequence[str]],
    opponent: Sequence[Sequence[str]],
    **options: Any,
) -> WinRate:
    """Let the n-th completion for each prompt meet the opponent's n-th (counted round where one side has fewer).

    Raises ``ValueError`` if the judge answers nothing.
    """
    duels, groups = [], []
    for group, (prompt, ours, theirs) in enumerate(zip(prompts, policy, opponent, strict=True)):
        for n in range(max(len(ours), len(theirs))):
            duels.append((prompt, ours[n % len(ours)], theirs[n % len(theirs)]))
            groups.append(group)
    verdicts = judge.verdicts(duels)
    answered = [(group, verdict) for group, verdict in zip(groups, verdicts, strict=True) if verdict is not None]
    if not answered:
        raise ValueError(f"judge: expected an answer to at least one of {len(duels)} duels, found none")
    kept, values = zip(*answered, strict=True)
    by_group: dict[int, list[float]] = {}
    for group, verdict in answered:
        by_group.setdefault(group, []).append(verdict)
    by_prompt = [float(np.mean(found)) - 0.5 for found in by_group.values()]
    return WinRate(rate(values, kept, **options), sign_flip_p(by_prompt), verdicts)


def best_of_data(records: Sequence[Record]) -> dict[str, list[str]]:
    """The data's own desirable, chosen or best completions by their prompt's key."""
    found: dict[str, list[str]] = {}
    try:
        examples = demonstrations(records).examples
    except ValueError as error:
        raise ValueError(f"opponent=data: {error}") from error
    for example in examples:
        texts = found.setdefault(prompt_key(example.prompt), [])
        if example.completion not in texts:
            texts.append(example.completion)
    return found
