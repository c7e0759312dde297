"""The micro-batches of a stream, and their loader."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from halos.data.batches.batch import Batch
from halos.data.batches.collate import collate, step_size
from halos.data.batches.loader import ResumableLoader
from halos.data.batches.order import Division
from halos.data.rows.chat_tokens import ChatTokens
from halos.data.rows.token_rows import Row
from halos.data.rows.tokenise import few_rows
from halos.data.streaming.examples import Counted, Drawn, Stream


@dataclass(slots=True)
class StreamRows:
    """Makes token rows of a stream's examples.

    Attributes:
        stream: the examples.
        tokens: tokenises them.
    """

    stream: Stream
    tokens: ChatTokens

    def rows(self, drawn: list[Drawn], counted: Counted) -> list[Row]:
        """Make the rows of examples, and count their tokens and what was truncated."""
        # Either all examples have a partner or none has, as the stream was made with or without mismatched ones.
        partners = [one.partner for one in drawn if one.partner is not None]
        rows, truncated = few_rows([one.example for one in drawn], partners, self.tokens, self.stream.needs.control)
        tokens = sum(len(row.prompt) + len(ids) for row in rows for ids in row.branches)
        counted.used.update({"tokens": tokens, **truncated})
        if self.stream.needs.view == "pairs" and (equal := sum(row.branches[0] == row.branches[1] for row in rows)):
            counted.used["pairs with the same tokens on both sides"] += equal
        return rows


Served = tuple[Batch | ValueError, Counted]
"""A micro-batch, and the counts up to it. In a loader's worker process, an error in the data takes the micro-batch's
place."""


class StreamBatches(IterableDataset[Served]):
    """The micro-batches of one rank, from number ``start`` to ``stop``.

    Every rank reads the whole stream and collates its own part. The m-th stretch of ``world_size * batch_size``
    examples is micro-step m, however it is divided over ranks, and every rank knows the size of a step without
    communication. The examples of earlier micro-batches are read again but not tokenised.

    Args:
        rows: makes the rows.
        division: the part of one rank.
        collate_rows: :func:`.collate`, with its options bound.
    """

    def __init__(self, rows: StreamRows, division: Division, collate_rows: Callable[..., Batch] = collate) -> None:
        self.rows, self.division, self.collate_rows = rows, division, collate_rows
        self.start, self.stop = 0, len(self)

    def __len__(self) -> int:
        return self.division.steps * self.division.accumulate

    def __iter__(self) -> Iterator[Served]:
        counted = Counted()
        try:
            yield from self._batches(counted)
        except ValueError as error:
            if get_worker_info() is None:
                raise
            yield error, counted  # if raised here, the loader would wrap it in the worker's traceback

    def _batches(self, counted: Counted) -> Iterator[tuple[Batch, Counted]]:
        per_step, accumulate = self.division.per_step, self.division.accumulate
        # Skipped examples are still drawn, so that the buffer and the waiting partners are those of the interrupted
        # run.
        drawn = islice(self.rows.stream.drawn(counted), self.start // accumulate * per_step, None)
        for number in range(self.start, self.stop):
            micro_step = number % accumulate
            if number == self.start or micro_step == 0:
                step = list(islice(drawn, per_step))
                rows = self.rows.rows(step, counted)
                size = step_size(rows, [{row.group: one.members for row, one in zip(rows, step, strict=True)}])
            batch = self.collate_rows(rows[self.division.rank_slice(micro_step)], step=size)
            # A worker's thread pickles the counts while the next batch is already adding to them, hence the copy.
            yield batch, counted if get_worker_info() is None else deepcopy(counted)


class StreamLoader(ResumableLoader):
    """Serves the micro-batches of a stream.

    Args:
        batches: the micro-batches.
        options: see :class:`.ResumableLoader`. At most one worker makes sense, as each one would read the whole stream.

    Attributes:
        counted: what was read and used up to the last batch that was served.
    """

    def __init__(self, batches: StreamBatches, **options: Any) -> None:
        super().__init__(batches, batches, **options)
        self.counted = Counted()

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Yield the batches. Raises ``ValueError`` for bad data that a worker found."""
        for batch, self.counted in super().__iter__():
            if isinstance(batch, ValueError):
                raise batch
            yield batch
