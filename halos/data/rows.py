"""Examples of a view → rows of token ids: one prompt followed by one or more completions (branches).

What each branch is depends on the view: pairs have (chosen, rejected); the other views have one completion, and a
second, mismatched one where the objective asks for KTO's reference point.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from halos.data.feedback import prompt_key
from halos.data.tokens import ChatTokens
from halos.data.views import Demonstration, Labelled, Pair, Scored

Example = Demonstration | Labelled | Pair | Scored
Control = Callable[[bool | None], str]
"""From an example's label to the text that ends its prompt (CSFT's control tokens)."""


@dataclass(frozen=True, slots=True)
class Row:
    """Token ids of one example: the prompt's, and those of each branch."""

    id: str
    group: int
    prompt: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]
    desirable: bool | None = None
    score: float | None = None


@dataclass(slots=True)
class Rows:
    """All rows of one data set, and counts of what was cut or dropped on the way."""

    rows: list[Row]
    report: Counter[str] = field(default_factory=Counter)
    truncated: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(what was cut, the file that it came from) → how often."""

    def __len__(self) -> int:
        return len(self.rows)


def make_rows(
    examples: Sequence[Example],
    tokens: ChatTokens,
    *,
    control: Control = lambda _: "",
    mismatched_seed: int | None = None,
    origin: Callable[[str], str] = str,
) -> Rows:
    """Tokenise examples; with ``mismatched_seed`` each row gets another prompt's completion as its last branch.

    ``origin`` says which file an example comes from, by its id. Raises ``ValueError`` naming the example for a prompt
    over the limits, and if nothing is left.
    """
    report: Counter[str] = Counter()
    truncated: Counter[tuple[str, str]] = Counter()
    groups: dict[str, int] = defaultdict(lambda: len(groups))
    rows, whole = [], []
    for example in examples:
        ids = tokens.prompt(example.prompt, control(_label(example)), where=example.id)
        prompt, cut = tokens.fit_prompt(ids, example.id)
        full = [tokens.completion(text) for text in texts_of(example)]
        branches = [tokens.fit_completion(ids, len(prompt))[0] for ids in full]
        shortened = sum(len(b) < len(f) for b, f in zip(branches, full, strict=True))
        for reason, count in (("prompts truncated", int(cut)), ("completions truncated", shortened)):
            if count:
                report[reason] += count
                truncated[reason, origin(example.id)] += count
        whole.append(full[0])
        rows.append(_row(example, groups[prompt_key(example.prompt)], prompt, branches))
    if not rows:
        raise ValueError("expected at least one example, found none")
    if mismatched_seed is not None:
        rows = _with_mismatched(rows, whole, tokens, mismatched_seed)
    return Rows(rows, report, truncated)


def derangement(groups: Sequence[int], seed: int) -> list[int]:
    """For each example the index of one with another prompt, drawn from the seed.

    A permutation without a fixed prompt wherever one exists: with the examples laid out group by group in random
    order, a cyclic shift by the size of the largest group leaves no example inside its own group. If one prompt owns
    more than half of the examples no such permutation exists, and partners are drawn independently.

    Raises ``ValueError`` if all examples share one prompt.
    """
    rng = random.Random(seed)
    members: dict[int, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    if len(members) < 2:
        raise ValueError(
            "the KL reference point compares a prompt with another prompt's completion: expected completions for at "
            "least two different prompts, found one"
        )
    largest = max(map(len, members.values()))
    if 2 * largest > len(groups):
        return _independent_partners(groups, max(members, key=lambda group: len(members[group])), rng)
    blocks = list(members.values())
    rng.shuffle(blocks)
    for block in blocks:
        rng.shuffle(block)
    order = [index for block in blocks for index in block]
    partner = [0] * len(order)
    for position, index in enumerate(order):
        partner[index] = order[(position + largest) % len(order)]
    return partner


def _independent_partners(groups: Sequence[int], majority: int, rng: random.Random) -> list[int]:
    outside = [index for index, group in enumerate(groups) if group != majority]

    def draw(group: int) -> int:
        if group == majority:
            return rng.choice(outside)
        # More than half of all examples qualify, so this ends after two draws on average.
        while groups[index := rng.randrange(len(groups))] == group:
            pass
        return index

    return [draw(group) for group in groups]


def _label(example: Example) -> bool | None:
    # The sign of a score is the label by which rewards are sorted in metrics.
    if isinstance(example, Scored):
        return example.score > 0
    return example.desirable if isinstance(example, Labelled) else None


def texts_of(example: Example) -> tuple[str, ...]:
    """The example's completions, the chosen one of a pair first."""
    return (example.chosen, example.rejected) if isinstance(example, Pair) else (example.completion,)


def _row(example: Example, group: int, prompt: list[int], branches: list[list[int]]) -> Row:
    return Row(
        id=example.id,
        group=group,
        prompt=tuple(prompt),
        branches=tuple(map(tuple, branches)),
        desirable=_label(example),
        score=example.score if isinstance(example, Scored) else None,
    )


def _with_mismatched(rows: list[Row], whole: list[list[int]], tokens: ChatTokens, seed: int) -> list[Row]:
    # y' is cut to the room behind x, not behind the prompt that it came from.
    paired = []
    for row, partner in zip(rows, derangement([row.group for row in rows], seed), strict=True):
        other, _ = tokens.fit_completion(whole[partner], len(row.prompt))
        paired.append(Row(row.id, row.group, row.prompt, (*row.branches, tuple(other)), row.desirable, row.score))
    return paired
