"""The micro-batches of a stream."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import islice
from typing import Unpack

from torch.utils.data import IterableDataset, get_worker_info

from halos.data.batches.collate import Batch, Collation, StepSize, collate, step_size
from halos.data.rows.chat_tokens import ChatTokens
from halos.data.rows.token_rows import Control, Row, few_rows
from halos.data.streaming.examples import Counted, Drawn, Stream


@dataclass(slots=True, kw_only=True)
class Layout:
    """How a run is divided into the micro-batches of one rank, as in :class:`halos.data.batches.order.TrainingOrder`.

    Attributes:
        batch_size: examples in a micro-batch of one rank.
        accumulate: micro-batches in an optimizer step.
        world_size: ranks with data of their own.
        rank: the number of this rank.
        steps: optimizer steps of the run.
    """

    batch_size: int
    accumulate: int = 1
    world_size: int = 1
    rank: int = 0
    steps: int = 0

    @property
    def per_micro_step(self) -> int:
        """Examples in a micro-step, on all ranks."""
        return self.batch_size * self.world_size

    @property
    def per_step(self) -> int:
        """Examples in an optimizer step, on all ranks."""
        return self.per_micro_step * self.accumulate


@dataclass(slots=True, kw_only=True)
class StreamRows:
    """Makes token rows of a stream's examples.

    Attributes:
        stream: the examples.
        tokens: tokenises them.
        control: see :data:`halos.data.rows.token_rows.Control`.
    """

    stream: Stream
    tokens: ChatTokens
    control: Control = field(default=lambda _: "")

    def rows(self, drawn: list[Drawn], counted: Counted) -> list[Row]:
        """Make the rows of examples, and count their tokens and what was truncated."""
        # Either all examples have a partner or none has, as the stream was made with or without mismatched ones.
        partners = [one.partner for one in drawn if one.partner is not None]
        rows, truncated = few_rows([one.example for one in drawn], partners, self.tokens, self.control)
        tokens = sum(len(row.prompt) + len(ids) for row in rows for ids in row.branches)
        counted.used.update({"tokens": tokens, **truncated})
        return rows


Served = tuple[Batch | ValueError, Counted]
"""A micro-batch, and the counts up to it. In a loader's worker process, an error in the data takes the micro-batch's
place."""


class StreamBatches(IterableDataset[Served]):
    """The micro-batches of one rank, from number ``start`` on.

    Every rank reads the whole stream and collates its own part. The m-th stretch of ``world_size * batch_size``
    examples is micro-step m, however it is divided over ranks, and every rank knows the size of a step without
    communication. The examples of earlier micro-batches are read again but not tokenised.

    Args:
        rows: makes the rows.
        layout: how the run is divided.
        options: see :func:`halos.data.batches.collate.collate`.
    """

    def __init__(self, rows: StreamRows, layout: Layout, **options: Unpack[Collation]) -> None:
        self.rows, self.layout, self.options = rows, layout, options
        self.start = 0

    def __len__(self) -> int:
        return self.layout.steps * self.layout.accumulate

    def __iter__(self) -> Iterator[Served]:
        counted = Counted()
        try:
            yield from self._batches(counted)
        except ValueError as error:
            if get_worker_info() is None:
                raise
            yield error, counted  # if raised here, the loader would wrap it in the worker's traceback

    def _batches(self, counted: Counted) -> Iterator[tuple[Batch, Counted]]:
        layout = self.layout
        first_step, first_micro_step = divmod(self.start, layout.accumulate)
        # Skipped examples are still drawn, so that the buffer and the waiting partners are those of the interrupted
        # run.
        drawn = islice(self.rows.stream.drawn(counted), first_step * layout.per_step, None)
        for _ in range(first_step, layout.steps):
            step = list(islice(drawn, layout.per_step))
            rows = self.rows.rows(step, counted)
            size = step_size(rows, {row.group: one.members for row, one in zip(rows, step, strict=True)})
            for number in range(first_micro_step, layout.accumulate):
                # A worker's thread pickles the counts while the next batch is already adding to them, hence the copy.
                yield self._batch(rows, number, size), counted if get_worker_info() is None else deepcopy(counted)
            first_micro_step = 0

    def _batch(self, rows: list[Row], number: int, size: StepSize) -> Batch:
        layout = self.layout
        start = number * layout.per_micro_step + layout.rank * layout.batch_size
        return collate(rows[start : start + layout.batch_size], step=size, **self.options)
