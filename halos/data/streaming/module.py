"""The DataModule of a run whose training data are a stream."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any

from halos.data.module import SHOWN_PROMPTS, PreferenceDataModule, first_prompts
from halos.data.preparation.intake import read_held
from halos.data.records.record import prompt_key
from halos.data.records.table import loose_prompt
from halos.data.rows.chat_tokens import ChatTokens
from halos.data.rows.token_rows import Control, Row
from halos.data.sources.base import Source
from halos.data.streaming.batches import Layout, StreamBatches, StreamRows
from halos.data.streaming.examples import Counted, Stream
from halos.data.streaming.loader import StreamLoader
from halos.processes.collectives import data_ranks

TRIED = 256
"""Bundles of examples that are looked at before the run."""


class StreamingDataModule(PreferenceDataModule):
    """Like its base, for training data of any size: records are read as they are needed, and begin at once.

    Memory is that of the shuffle buffer. The stream is read again, in another order, as often as the run's steps take;
    a resumed run reads what was used before again, without tokenising it. Validation data are made beforehand: the
    source's own, or the first ``val_size`` records of the stream; training leaves out what has one of their prompts
    (the base leaves out of validation what training has).

    Args:
        source: where feedback comes from.
        shuffle_buffer: examples from which the next one is drawn; 1 keeps the order of the source.
        options: those of the base. What needs all of the data at once is refused: ``stratified``, ``max_examples``,
            a threshold at the ``median``. ``workers`` may be 1: a process reads, tokenises and collates.

    Raises ``ValueError`` for these, and for sources that can only be read whole.
    """

    streams = True
    _stream: Stream
    _rows: StreamRows
    _first: Row

    def __init__(self, source: Source, *, shuffle_buffer: int = 10_000, streaming: bool = True, **options: Any) -> None:
        super().__init__(source, shuffle_buffer=shuffle_buffer, streaming=streaming, **options)
        for name, refused in (
            ("max_examples: expected null", self._most["train"] is not None),
            ("stratified: expected false", self._stratified),
            ("workers: expected 0 or 1", self.workers > 1),
        ):
            if refused:
                raise ValueError(f"data.{name} with data.streaming=true, found {options[name.split(':')[0]]!r}")
        self.selection.check_stream()
        source.check_stream()
        self._held: frozenset[int] | None = None
        self._counted: Callable[[], Counted] = Counted
        self._before: Counter[str] = Counter()

    def read(self) -> None:
        """Read the validation records."""
        self.source.store = self._store
        self.intake, held = read_held(self.source, val_size=self._val_size, strict=self._strict)
        self.intake.examine()
        self.reports = self.intake.reports
        self._held = frozenset(loose_prompt(record.prompt) for record in held)
        self._origins = [file for files in self.intake.origins.values() for file in files]

    def load(self, view: str) -> None:
        """Read the validation records, derive the view's examples of them, and try the first ones of the stream."""
        if self._held is None:
            self.read()
        self._derive(view)
        held = self._held or frozenset()
        options: dict[str, Any] = {
            "strict": self._strict,
            "strict_held": self._strict and bool(self.intake.origins.get("val")),
        }
        options |= {"selection": self.selection, "train_on": self._train_on, "seed": self.seed, "held": held}
        self._stream = Stream(source=self.source, view=view, buffer=self.shuffle_buffer, **options)
        tried = islice(self._stream.examples(Counted()), TRIED)
        prompts = {prompt_key(example.prompt): example.prompt for bundle in tried for example in bundle}
        self.prompts = list(prompts.values())[:SHOWN_PROMPTS]
        if "val" in self._examples:
            self.prompts = first_prompts(self._examples["val"])

    def tokenise(self, tokenizer: Any, *, control: Control = lambda _: "", **options: bool) -> None:
        """Make token rows of the validation examples, and the stream's first one.

        Raises ``ValueError`` naming the example for a prompt over the limits.
        """
        super().tokenise(tokenizer, control=control, **options)
        together = None if self._grouped else self._keep_together
        self._stream = replace(self._stream, together=together, mismatched=self._mismatched)
        self._rows = StreamRows(stream=self._stream, tokens=ChatTokens(tokenizer, self.limits), control=control)
        drawn = next(replace(self._stream, buffer=1).drawn(Counted()))
        (self._first,) = self._rows.rows([drawn], Counted())

    def example(self) -> Row:
        """The first row of the stream."""
        return self._first

    def keys(self) -> dict[str, str]:
        """Of the stream, a key of its files' names, sizes and ends and of the settings."""
        stream, tokens = self._stream, self._rows.tokens
        settings = {name: getattr(stream, name) for name in Stream.__slots__ if name not in ("source", "held")}
        controls = [tokens.control(self._rows.control(label)) for label in (True, False, None)]
        told = (self.source.stream_key(), settings, sorted(stream.held), tokens.key, self.limits, controls)
        return {"train": hashlib.sha256(repr(told).encode()).hexdigest()[:12], **super().keys()}

    def plan(self, *, epochs: int | None, max_steps: int, accumulate: int, world_size: int) -> int:
        """The number of optimizer steps of the run: ``max_steps``, whatever ``epochs``."""
        if max_steps < 1:
            raise ValueError(
                "trainer.max_steps: expected the number of steps of the run with data.streaming=true, as nobody knows "
                f"how many an epoch has; found {max_steps}"
            )
        self.steps = max_steps
        return max_steps

    def longest(self) -> int:
        """The most tokens that a sequence, prompt and completion, can have."""
        return self.limits.max_length

    def state_dict(self) -> dict[str, Any]:
        """Lightning keeps this in the checkpoint."""
        return {**super().state_dict(), "used": dict(self._used())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ``ValueError`` as the base does."""
        super().load_state_dict(state)
        self._before = Counter(state["used"])

    def tokens_in(self, steps: int, *, accumulate: int, world_size: int) -> int:
        """Tokens that the steps so far have read, on all ranks."""
        return self._used()["tokens"]

    def scored_rows(self, *, accumulate: int, world_size: int) -> list[Row]:
        """Raises ``ValueError``: nobody knows them beforehand."""
        raise ValueError("expected a reference that is not computed beforehand with data.streaming=true, found cached")

    def train_dataloader(self) -> StreamLoader:
        """All micro-batches of the run, as one Lightning epoch."""
        trainer = self._trainer()
        rank, world_size = data_ranks(trainer)
        layout = Layout(
            batch_size=self.batch_size,
            accumulate=trainer.accumulate_grad_batches,
            world_size=world_size,
            rank=rank,
            steps=self.steps,
        )
        chunks = min(self.length_groups, self.batch_size)
        loader = StreamLoader(
            StreamBatches(self._rows, layout, chunks=chunks, **self._collation()), **self._loader_options()
        )
        self._counted = lambda: loader.counted
        return loader

    def take_account(self) -> bool:
        """Bring the report up to what was read by now; whether anything was."""
        counted = self._counted()
        dropped = sum((origin.dropped for origin in counted.origins.values()), Counter())
        self.reports["train"] = Counter({"passes": counted.passes}) + counted.read + dropped + self._used()
        self.intake.origins["train"] = counted.origins
        return counted.passes > 0

    def _used(self) -> Counter[str]:
        return self._before + self._counted().used
