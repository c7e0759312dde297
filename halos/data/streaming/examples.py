"""Examples from a stream: a source of any size and unknown length, read in constant memory.

    records → runs → bundles → shuffled → (each with its mismatched example) → rows

A run is a few records of the same prompt that follow each other in the source. What prepared data do with all records
of a prompt (pairing labels, a prompt's own median, one example of a prompt, examples kept together), a stream does with
the records of a run. Everything is a function of the source, the settings and the seed, so that a resumed run can read
the stream again up to its place.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import TYPE_CHECKING, TypeVar

from halos.data.preparation.needs import DataNeeds
from halos.data.records.adapted import FileCounts
from halos.data.records.record import Record, conversation_key, prompt_key
from halos.data.records.table import loose_prompt
from halos.data.views.derive import of_run
from halos.data.views.examples import Example
from halos.data.views.turns import with_turns

if TYPE_CHECKING:
    from halos.data.streaming.preparation import StreamPreparation

RUN_MAX_RECORDS = 1024
"""The most records in a run; a longer sequence of one prompt becomes several runs."""
MISMATCH_MAX_WAITING_EXAMPLES = 1024
"""The most examples that wait for a mismatched completion. Many wait only if nearly all examples have the same
prompt."""
IN_VALIDATION = "training records whose prompt is in the validation data left out"

T = TypeVar("T")


@dataclass(slots=True)
class Counted:
    """Counts of what was read of a stream.

    Attributes:
        origins: the files that were read, by name.
        read: how often something was read, converted or left out in the first pass; later passes do not count again.
        used: counts of what training has used, such as tokens, in all passes.
        passes: the number of the current pass, from 1 on.
    """

    origins: dict[str, FileCounts] = field(default_factory=dict)
    read: Counter[str] = field(default_factory=Counter)
    used: Counter[str] = field(default_factory=Counter)
    passes: int = 0


@dataclass(slots=True)
class Drawn:
    """An example that was drawn for training.

    Attributes:
        example: the example.
        members: how many examples of its prompt were drawn together.
        partner: the example whose completion is the mismatched one, once there is one.
    """

    example: Example
    members: int
    partner: Example | None = None


@dataclass(frozen=True, slots=True)
class Stream:
    """The training examples of a view, pass after pass, without end.

    Args:
        settings: how the data are read, selected and shuffled.
        needs: the view, whether each example comes with one of another prompt, and whether all examples of a run are
            drawn together.
        held: keys (:func:`.loose_prompt`) of the prompts in the validation data, which training leaves out.
        strict_held: raise an error for a training record whose prompt is in the validation data.
    """

    settings: StreamPreparation
    needs: DataNeeds
    held: frozenset[int] = frozenset()
    strict_held: bool = False

    def drawn(self, counted: Counted) -> Iterator[Drawn]:
        """The examples in the order of training.

        Args:
            counted: counts what is read.

        Raises:
            ValueError: for bad data, for a whole pass without an example, and if mismatched completions are needed but
                all examples have the same prompt.
        """
        drawn = self._passes(counted)
        return with_partners(drawn) if self.needs.flags.mismatched else drawn

    def examples(self, counted: Counted) -> Iterator[Sequence[Example]]:
        """One pass in the order of the source, in bundles of examples that are drawn together."""
        settings, view, counts = self.settings, self.needs.view, counted.read
        together = None if self.needs.flags.grouped else settings.keep_together
        for run in runs(self._records(counted)):
            records = run
            if settings.train_on == "all":
                records = [turn for record in run for turn in with_turns(record, counts)]
            # Thresholds such as a prompt's own median come from the run as it was read, not from its separate turns.
            examples, report = of_run(view, records, settings.selection.prepare_run(view, run))
            counts.update(report)
            examples, report = settings.selection.keep_of_run(examples, settings.seed)
            counts.update(report)
            counts["examples"] += len(examples)
            # Turns of a conversation share their tokens; an objective with groups needs those of each prompt.
            key = prompt_key if self.needs.flags.grouped else conversation_key
            for _, group in groupby(examples, key=lambda example: key(example.prompt)):
                yield from bundles(list(group), together)

    def _passes(self, counted: Counted) -> Iterator[Drawn]:
        for number in itertools.count():
            counted.passes = number + 1
            # The second pass reads the same records again; counting them twice would overstate the size of the data.
            pass_counted = counted if number == 0 else Counted()
            # As in TrainingOrder, the order of a pass depends only on the seed and the number of the pass.
            rng = random.Random((self.settings.seed << 20) + number)
            empty = True
            for bundle in shuffled(self.examples(pass_counted), self.settings.shuffle_buffer, rng):
                empty = False
                yield from (Drawn(example, len(bundle)) for example in bundle)
            if empty:
                raise ValueError(_no_example(self.needs.view, pass_counted))

    def _records(self, counted: Counted) -> Iterator[Record]:
        for record in self.settings.source.stream(counted.origins, strict=self.settings.strict):
            # Loosely equal prompts (case, spaces) count as the same: they would leak what is validated on.
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


def _no_example(view: str, counted: Counted) -> str:
    counts = sum((origin.dropped for origin in counted.origins.values()), Counter(counted.read))
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items() if reason != "records" and count)
    return (
        f"data: expected an example for a loss that learns from {view}, found none in {counted.read['records']} records"
        f"{f' ({reasons})' if reasons else ''}"
    )


def runs(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Group records of the same prompt that follow each other, up to :data:`RUN_MAX_RECORDS` at a time."""
    for _, group in groupby(records, key=lambda record: prompt_key(record.prompt)):
        # groupby's groups read from the same iterator, so a group has to be used up before the next one is taken.
        while run := list(islice(group, RUN_MAX_RECORDS)):
            yield run


def bundles(examples: Sequence[T], max_size: int | None) -> Iterator[Sequence[T]]:
    """Divide examples into bundles of up to ``max_size``; None: one bundle."""
    size = max_size or max(1, len(examples))
    return (examples[start : start + size] for start in range(0, len(examples), size))


def shuffled(incoming: Iterable[Sequence[T]], buffer: int, rng: random.Random) -> Iterator[Sequence[T]]:
    """Shuffle bundles with a buffer: each is drawn from the bundles that hold the next ``buffer`` items."""
    # The buffer counts items, not bundles, so that memory stays the same however large the bundles are.
    waiting: list[Sequence[T]] = []
    size = 0
    for bundle in incoming:
        waiting.append(bundle)
        size += len(bundle)
        while size >= buffer:
            chosen = _pop_random(waiting, rng)
            size -= len(chosen)
            yield chosen
    while waiting:
        yield _pop_random(waiting, rng)


def _pop_random(waiting: list[Sequence[T]], rng: random.Random) -> Sequence[T]:
    # Swapped to the end first: removing from the middle of a list moves everything after it.
    place = rng.randrange(len(waiting))
    waiting[place], waiting[-1] = waiting[-1], waiting[place]
    return waiting.pop()


def with_partners(incoming: Iterable[Drawn]) -> Iterator[Drawn]:
    """Give each example, in order, the next example of another prompt that is not a partner yet.

    Every completion therefore serves as the mismatched one once, as in :func:`halos.data.rows.mismatch.derangement`,
    which needs the whole data set. An example is held back until it has a partner, and those after it wait too. For the
    prompts A A B A B:

        incoming   A₁   A₂   B₁          A₃          B₂
        partner              B₁ of A₁    A₃ of B₁    B₂ of A₂
        outgoing             A₁          –           A₂ B₁

    If one prompt has so much of the stream that more than :data:`MISMATCH_MAX_WAITING_EXAMPLES` examples wait, the
    first of them takes the last example of another prompt, even if that is a partner already.

    Raises:
        ValueError: more than that wait, and all examples so far have the same prompt.
    """
    waiting: deque[tuple[str, Drawn]] = deque()
    # The last example, preceded by the last one of another prompt. For any prompt, one of the two has a different one.
    last: list[tuple[str, Drawn]] = []
    for drawn in incoming:
        prompt = prompt_key(drawn.example.prompt)
        # The longest waiting example comes first, which keeps the queue short.
        without_partner = (one for other, one in waiting if one.partner is None and other != prompt)
        if first := next(without_partner, None):
            first.partner = drawn.example
        waiting.append((prompt, drawn))
        last = [*(entry for entry in last if entry[0] != prompt), waiting[-1]][-2:]
        longest_waiting = waiting[0][1]
        if len(waiting) > MISMATCH_MAX_WAITING_EXAMPLES and longest_waiting.partner is None:
            others = [one.example for other, one in last if other != waiting[0][0]]
            if not others:
                raise ValueError(
                    "the reference point z₀ compares a prompt with another prompt's completion: expected different "
                    f"prompts in the stream, found one in {MISMATCH_MAX_WAITING_EXAMPLES} examples"
                )
            longest_waiting.partner = others[-1]
        # The loop ends before the queue is empty, because the example that came last has no partner yet.
        while waiting[0][1].partner is not None:
            yield waiting.popleft()[1]
