"""The preparation of a stream before training: its validation rows, and a trial of its first examples."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from halos.data.preparation.cautions import warn_of_equal_pairs, warn_of_one_class
from halos.data.preparation.graded import check_graded
from halos.data.preparation.intake import Intake, read_held
from halos.data.preparation.needs import DataNeeds
from halos.data.preparation.prepare import MAX_PROMPTS, Preparation, Prepared, drawn_prompts
from halos.data.records.record import prompt_key
from halos.data.rows.token_rows import Row
from halos.data.rows.unknown import check_known, count_unknown, unknown_id
from halos.data.streaming.batches import StreamRows
from halos.data.streaming.examples import Counted, Drawn, Stream
from halos.data.views.examples import Example, Labelled

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRIED_BUNDLES = 256
"""Bundles of examples that are read before the run, as a trial."""
TRIED_EXAMPLES = 256
"""Examples that are tokenised before the run."""


@dataclass(frozen=True, slots=True)
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
        names = ("selection", "train_on", "shuffle_buffer", "keep_together", "strict", "seed", "limits")
        settings = [getattr(stream.settings, name) for name in names]
        source_key = stream.settings.source.stream_key()
        contents = (source_key, settings, self.needs.key(), sorted(stream.held), stream.strict_held, tokens.key)
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
        keep_together: up to this many examples of one conversation are drawn together.

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
        self.source.store, self.source.reading = self.store, self.reading
        intake = read_held(self.source, val_size=self.val_size, strict=self.strict)
        intake.examine()
        return intake

    def prepare(self, needs: DataNeeds, tokenizer: PreTrainedTokenizerBase) -> PreparedStream:
        """Make rows of the validation data, and try the first examples of the stream.

        Raises ``ValueError`` for bad data in either.
        """
        if needs.views:
            expected = "expected false for a mixture of several views, found true"
            raise ValueError(f"data.streaming: {expected}; a stream is read in one view")
        if needs.flags.step_labels:
            raise ValueError(
                "data.streaming: expected false for a loss that learns from labels of steps (loss.step_labels), found "
                "true; which steps the limits cut has to be known before the first step"
            )
        intake = self.read()
        held = intake.records["val"].numbers("loose_prompt").tolist() if "val" in intake.records else ()
        self.derive(intake, needs)
        stream = Stream(self, needs, frozenset(held), strict_held=self.strict and bool(intake.origins.get("val")))
        # Read before a model is loaded, so that a fault in the first examples shows within seconds.
        bundles = islice(stream.examples(Counted()), TRIED_BUNDLES)
        tried = [example for bundle in bundles for example in bundle]
        prompts = {prompt_key(example.prompt): example.prompt for example in tried}
        shown = list(prompts.values())[:MAX_PROMPTS]
        if "val" in intake.examples:
            shown = drawn_prompts(intake.examples["val"], self.seed)
        rows = self.tokenise(intake, needs, tokenizer)
        stream_rows = StreamRows(stream, self.tokens(tokenizer))
        self._try(tried[:TRIED_EXAMPLES], stream_rows)
        # Without a shuffle buffer, as filling it would read thousands of examples for one row.
        unshuffled = replace(stream, settings=replace(self, shuffle_buffer=1))
        drawn = next(unshuffled.drawn(Counted()))
        (first,) = stream_rows.rows([drawn], Counted())
        return PreparedStream(needs, tokenizer, rows, intake, None, shown, stream_rows, first)

    def _try(self, examples: Sequence[Example], stream_rows: StreamRows) -> None:
        """Tokenise the first examples, so that what the run would refuse or learn nothing from shows before it."""
        rows = stream_rows.rows([Drawn(example, 1) for example in examples], Counted())
        tokenizer = stream_rows.tokens.tokenizer
        ids = pa.array([ids for row in rows for ids in (row.prompt, *row.branches)])
        check_known([count_unknown([ids], unknown_id(tokenizer))], tokenizer, rows[0].id)
        check_graded(rows, stream_rows.stream.needs)
        name = f"the first {len(rows):,}"
        if stream_rows.stream.needs.view == "pairs":
            warn_of_equal_pairs(f"{name} pairs of the stream", rows, self.limits.max_length)
        labels = [example.desirable for example in examples if isinstance(example, Labelled)]
        warn_of_one_class(f"{name} completions of the stream", np.array(labels, dtype=bool))
