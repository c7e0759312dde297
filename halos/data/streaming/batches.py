"""The micro-batches of a stream."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from halos.data.batches.collate import Batch, StepSize, collate, step_size
from halos.data.rows.chat_tokens import ChatTokens
from halos.data.rows.token_rows import Control, Row, few_rows
from halos.data.streaming.examples import Counted, Drawn, Stream


@dataclass(slots=True, kw_only=True)
class Layout:
    """How a run is divided: the micro-batches of one rank, as in :class:`halos.data.batches.order.TrainingOrder`."""

    batch_size: int
    accumulate: int = 1
    world_size: int = 1
    rank: int = 0
    steps: int = 0

    @property
    def wide(self) -> int:
        """Examples in a micro-step, on all ranks."""
        return self.batch_size * self.world_size

    @property
    def per_step(self) -> int:
        """Examples in an optimizer step."""
        return self.wide * self.accumulate


@dataclass(slots=True, kw_only=True)
class StreamRows:
    """The token rows of a stream."""

    stream: Stream
    tokens: ChatTokens
    control: Control = field(default=lambda _: "")

    def rows(self, drawn: list[Drawn], counted: Counted) -> list[Row]:
        """The rows of the examples; what was cut is counted."""
        partners = [one.partner for one in drawn if one.partner is not None]
        rows, cut = few_rows([one.example for one in drawn], partners, self.tokens, self.control)
        counted.used.update({"tokens": sum(len(row.prompt) + len(ids) for row in rows for ids in row.branches), **cut})
        return rows


class StreamBatches(IterableDataset[tuple[Batch | ValueError, Counted]]):
    """Each micro-batch of a rank from number ``start`` on, with what was counted up to it; in a worker of a loader, an
    error with bad data takes the place of the batch.

    Every rank reads the whole stream and collates its part: the m-th stretch of ``world_size * batch_size`` examples is
    micro-step m, whichever way it is divided, and the denominators of a step are known without communication. What was
    served before is read again but not tokenised.
    """

    def __init__(self, rows: StreamRows, layout: Layout, **options: Any) -> None:
        self.rows, self.layout, self.options = rows, layout, options
        self.start = 0

    def __len__(self) -> int:
        return self.layout.steps * self.layout.accumulate

    def __iter__(self) -> Iterator[tuple[Batch | ValueError, Counted]]:
        counted = Counted()
        try:
            yield from self._batches(counted)
        except ValueError as error:
            if get_worker_info() is None:
                raise
            yield error, counted  # a loader would wrap it in the worker's traceback

    def _batches(self, counted: Counted) -> Iterator[tuple[Batch, Counted]]:
        layout = self.layout
        done, micro = divmod(self.start, layout.accumulate)
        drawn = islice(self.rows.stream.drawn(counted), done * layout.per_step, None)
        for _ in range(done, layout.steps):
            step = list(islice(drawn, layout.per_step))
            rows = self.rows.rows(step, counted)
            size = step_size(rows, {row.group: one.members for row, one in zip(rows, step, strict=True)})
            for number in range(micro, layout.accumulate):
                # A worker's thread pickles what was counted while the next batch already counts on.
                yield self._batch(rows, number, size), counted if get_worker_info() is None else deepcopy(counted)
            micro = 0

    def _batch(self, rows: list[Row], number: int, size: StepSize) -> Batch:
        start = number * self.layout.wide + self.layout.rank * self.layout.batch_size
        return collate(rows[start : start + self.layout.batch_size], step=size, **self.options)
