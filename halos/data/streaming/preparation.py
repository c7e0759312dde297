"""The preparation of a stream before training: its validation rows, and a trial of its first examples."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

from halos.data.preparation.intake import Intake, read_held
from halos.data.preparation.prepare import SHOWN_PROMPTS, DataNeeds, Preparation, Prepared, first_prompts
from halos.data.records.record import prompt_key
from halos.data.records.table import loose_prompt
from halos.data.rows.token_rows import Row
from halos.data.streaming.batches import StreamRows
from halos.data.streaming.examples import Counted, Stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRIED_BUNDLES = 256
"""Bundles of examples that are read before the run, as a trial."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedStream(Prepared):
    """The stream of training rows, its first row, and the rows of the validation data.

    Attributes:
        stream_rows: the token rows of the training data, read while training.
        first: the first training row.
    """

    stream_rows: StreamRows
    first: Row

    def keys(self) -> dict[str, str]:
        """A key of each split's contents. The key of the stream covers the names, sizes and ends of its files."""
        stream, tokens = self.stream_rows.stream, self.stream_rows.tokens
        settings = {name: getattr(stream, name) for name in Stream.__slots__ if name not in ("source", "held")}
        controls = [tokens.control(self.needs.control(label)) for label in (True, False, None)]
        contents = (stream.source.stream_key(), settings, sorted(stream.held), tokens.key, tokens.limits, controls)
        return {"train": hashlib.sha256(repr(contents).encode()).hexdigest()[:12], **Prepared.keys(self)}

    def example(self) -> Row:
        """The first row of the stream."""
        return self.first

    def longest(self) -> int:
        """The most tokens that a sequence, prompt and completion, can have."""
        return self.stream_rows.tokens.limits.max_length


@dataclass(frozen=True, kw_only=True)
class StreamPreparation(Preparation):
    """How the feedback of a stream becomes token rows: its validation data before training, the rest during it.

    Args:
        shuffle_buffer: examples from which the next one is drawn.
        keep_together: up to this many examples of one prompt are drawn together.

    Raises ``ValueError`` for settings that need all of the data at once, and for sources that can only be read whole.
    """

    shuffle_buffer: int = 10_000
    keep_together: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.selection.check_stream()
        self.source.check_stream()

    def read(self) -> Intake:
        """Read the validation records."""
        return self._read_held()[0]

    def _read_held(self) -> tuple[Intake, frozenset[int]]:
        self.source.store = self.store
        intake, records = read_held(self.source, val_size=self.val_size, strict=self.strict)
        intake.examine()
        return intake, frozenset(loose_prompt(record.prompt) for record in records)

    def prepare(self, needs: DataNeeds, tokenizer: PreTrainedTokenizerBase) -> PreparedStream:
        """Make rows of the validation data, and try the first examples of the stream.

        Raises ``ValueError`` for bad data in either.
        """
        intake, held = self._read_held()
        self.derive(intake, needs.view)
        stream = self.stream(intake, needs, held)
        # Read before a model is loaded, so that a fault in the first examples shows within seconds.
        tried = islice(stream.examples(Counted()), TRIED_BUNDLES)
        prompts = {prompt_key(example.prompt): example.prompt for bundle in tried for example in bundle}
        shown = list(prompts.values())[:SHOWN_PROMPTS]
        if "val" in intake.examples:
            shown = first_prompts(intake.examples["val"])
        rows = self.tokenise(intake, needs, tokenizer)
        stream_rows = StreamRows(stream=stream, tokens=self.tokens(tokenizer), control=needs.control)
        # Without a shuffle buffer, as filling it would read thousands of examples for one row.
        drawn = next(replace(stream, buffer=1).drawn(Counted()))
        (first,) = stream_rows.rows([drawn], Counted())
        return PreparedStream(
            needs=needs,
            tokenizer=tokenizer,
            rows=rows,
            intake=intake,
            label_counts=None,
            prompts=shown,
            stream_rows=stream_rows,
            first=first,
        )

    def stream(self, intake: Intake, needs: DataNeeds, held: frozenset[int]) -> Stream:
        """The training examples as they will be read."""
        return Stream(
            source=self.source,
            view=needs.view,
            selection=self.selection,
            train_on=self.train_on,
            buffer=self.shuffle_buffer,
            together=None if needs.grouped else self.keep_together,
            mismatched=needs.mismatched,
            held=held,
            strict=self.strict,
            strict_held=self.strict and bool(intake.origins.get("val")),
            seed=self.seed,
        )
