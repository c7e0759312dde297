"""Examples from a stream: of a source of any size and unknown length, in memory that its size does not change.

    records → runs → bundles → shuffled → (each with its mismatched one) → rows

A run is a few records of one prompt that follow each other in the source. What the materialised path does with all of
a prompt's records (pairing labels, a prompt's own median, one example of a prompt, examples kept together) a stream
does with those of a run. Everything is a function of the source, the settings and the seed, so that a stream can be
read again to any place.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any, TypeVar

from halos.data.records.record import Record, prompt_key
from halos.data.records.table import loose_prompt
from halos.data.rows.token_rows import Example
from halos.data.sources.base import Source
from halos.data.sources.origin import Origin
from halos.data.views.derive import of_run
from halos.data.views.selection import Selection
from halos.data.views.turns import with_turns

LONGEST_RUN = 1024
"""Records."""
MOST_WAITING = 1024
"""Examples that wait for a mismatched completion, while one prompt has nearly all of the stream."""
IN_VALIDATION = "training records whose prompt is in the validation data left out"

T = TypeVar("T")


@dataclass(slots=True)
class Counted:
    """What was read of a stream. Each record counts once, however many passes there are; ``used`` counts what
    training has used."""

    origins: dict[str, Origin] = field(default_factory=dict)
    read: Counter[str] = field(default_factory=Counter)
    used: Counter[str] = field(default_factory=Counter)
    passes: int = 0


@dataclass(frozen=True, slots=True)
class Drawn:
    """An example in its place in training; ``members``: how many of its prompt were drawn together; ``partner``: whose
    completion is the mismatched one."""

    example: Example
    members: int
    partner: Example | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """The training examples of a view, pass after pass, without end.

    Args:
        source: where the records come from.
        view: see :data:`halos.data.views.derive.VIEWS`.
        selection: which of the feedback is used.
        train_on: ``last`` or, for demonstrations, ``all`` assistant turns.
        buffer: examples in the shuffle buffer; 1 keeps the order of the source.
        together: at most so many examples of a run are drawn together; None for all of them.
        mismatched: whether each example comes with another prompt's.
        held: keys (:func:`.loose_prompt`) of the prompts that are validated on, which training leaves
            out.
        strict: raise ``ValueError`` for what would be left out because the data are at fault; ``strict_held``: for a
            prompt that is validated on.
        seed: of all draws.
    """

    source: Source
    view: str
    selection: Selection = field(default_factory=Selection)
    train_on: str = "last"
    buffer: int = 10_000
    together: int | None = 2
    mismatched: bool = False
    held: frozenset[int] = frozenset()
    strict: bool = False
    strict_held: bool = False
    seed: int = 0

    def drawn(self, counted: Counted) -> Iterator[Drawn]:
        """Examples in the order of training.

        Raises ``ValueError`` for bad data, for a whole pass without an example, and if mismatched completions are
        wanted of data with one prompt.
        """
        found = self._passes(counted)
        return with_partners(found) if self.mismatched else found

    def examples(self, counted: Counted) -> Iterator[Sequence[Any]]:
        """One pass in the order of the source, in bundles of examples that are drawn together."""
        for run in runs(self._records(counted)):
            counts = counted.read
            records = [made for r in run for made in with_turns(r, counts)] if self.train_on == "all" else run
            found, report = of_run(self.view, records, self.selection.prepare_run(self.view, run))
            counts.update(report)
            found, report = self.selection.keep_of_run(found, self.seed)
            counts.update(report)
            counts["examples"] += len(found)
            for _, group in groupby(found, key=lambda example: prompt_key(example.prompt)):
                yield from bundles(list(group), self.together)

    def _passes(self, counted: Counted) -> Iterator[Drawn]:
        for number in itertools.count():
            counted.passes = number + 1
            told = counted if number == 0 else Counted()
            rng = random.Random((self.seed << 20) + number)
            empty = True
            for bundle in shuffled(self.examples(told), self.buffer, rng):
                empty = False
                yield from (Drawn(example, len(bundle)) for example in bundle)
            if empty:
                raise ValueError(_nothing(self.view, told))

    def _records(self, counted: Counted) -> Iterator[Record]:
        for record in self.source.stream(counted.origins, strict=self.strict):
            if self.held and loose_prompt(record.prompt) in self.held:
                if self.strict_held:
                    raise ValueError(
                        "data.strict: expected training prompts that are not in the validation data; found that of "
                        f"{record.id}"
                    )
                counted.read[IN_VALIDATION] += 1
                continue
            counted.read["records"] += 1
            yield record


def _nothing(view: str, counted: Counted) -> str:
    reasons = sum((origin.dropped for origin in counted.origins.values()), Counter(counted.read))
    told = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if reason != "records" and count)
    return (
        f"expected an example for a loss that learns from {view}, found none in {counted.read['records']} records"
        f"{f' ({told})' if told else ''}"
    )


def runs(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Records of one prompt that follow each other, at most :data:`LONGEST_RUN`."""
    for _, group in groupby(records, key=lambda record: prompt_key(record.prompt)):
        while run := list(islice(group, LONGEST_RUN)):
            yield run


def bundles(examples: Sequence[T], most: int | None) -> Iterator[Sequence[T]]:
    """The examples, at most so many at a time; None: all at once."""
    size = most or max(1, len(examples))
    return (examples[start : start + size] for start in range(0, len(examples), size))


def shuffled(found: Iterable[Sequence[T]], buffer: int, rng: random.Random) -> Iterator[Sequence[T]]:
    """The bundles in random order: each is drawn from those that hold the next ``buffer`` items."""
    waiting: list[Sequence[T]] = []
    size = 0
    for bundle in found:
        waiting.append(bundle)
        size += len(bundle)
        while size >= buffer:
            chosen = _taken(waiting, rng)
            size -= len(chosen)
            yield chosen
    while waiting:
        yield _taken(waiting, rng)


def _taken(waiting: list[Sequence[T]], rng: random.Random) -> Sequence[T]:
    place = rng.randrange(len(waiting))
    waiting[place], waiting[-1] = waiting[-1], waiting[place]
    return waiting.pop()


@dataclass(slots=True)
class _Waiting:
    prompt: str
    drawn: Drawn
    partner: Example | None = None


def with_partners(found: Iterable[Drawn]) -> Iterator[Drawn]:
    """Each example, in order, with the next one of another prompt that is nobody's partner yet.

    So every completion is the mismatched one once, as in the derangement of a data set that is known whole. Where one
    prompt has so much of the stream that :data:`MOST_WAITING` examples wait, the first of them takes the last example
    of another prompt, whoever else has it. Raises ``ValueError`` if there was none.
    """
    waiting: deque[_Waiting] = deque()
    last: tuple[_Waiting, ...] = ()  # the last example, and before it the last one of another prompt than its
    for drawn in found:
        this = _Waiting(prompt_key(drawn.example.prompt), drawn)
        free = (entry for entry in waiting if entry.partner is None and entry.prompt != this.prompt)
        if first := next(free, None):
            first.partner = drawn.example
        waiting.append(this)
        last = (*(entry for entry in last if entry.prompt != this.prompt), this)[-2:]
        if len(waiting) > MOST_WAITING and waiting[0].partner is None:
            waiting[0].partner = _other(waiting[0].prompt, last)
        while waiting[0].partner is not None:  # the last one never has a partner
            ready = waiting.popleft()
            yield Drawn(ready.drawn.example, ready.drawn.members, ready.partner)


def _other(prompt: str, last: Sequence[_Waiting]) -> Example:
    for entry in reversed(last):
        if entry.prompt != prompt:
            return entry.drawn.example
    raise ValueError(
        "the KL reference point compares a prompt with another prompt's completion: expected different prompts in the "
        f"stream, found one in {MOST_WAITING} examples"
    )
