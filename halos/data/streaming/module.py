"""The DataModule of a run whose training data are a stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl

from halos.checks import check_whole
from halos.data.module import PreferenceDataModule
from halos.data.rows.chosen import ChosenRows
from halos.data.sources.base import Source
from halos.data.sources.file_source import Files
from halos.data.streaming.batches import StreamBatches, StreamLoader
from halos.data.streaming.examples import Counted
from halos.data.streaming.preparation import PreparedStream, StreamPreparation


class StreamingDataModule(PreferenceDataModule):
    """Feedback of any size in batches: training records are read while training, which begins at once.

    The shuffle buffer determines the memory use. The stream is read again, in another order, as often as the run's
    steps require. A resumed run reads the examples that it has already used once more, without tokenising them.
    Validation data are prepared before training: the source's own, or the first ``val_size`` records of the stream.
    Training leaves out records whose prompt is in the validation data. (``PreferenceDataModule`` does the reverse: it
    leaves out validation records whose prompt is in the training data.)

    Args:
        source, val: as for :class:`halos.data.PreferenceDataModule`.
        shuffle_buffer: examples from which the next one is drawn; 1 keeps the order of the source.
        options: as for :class:`halos.data.PreferenceDataModule`. Settings that need all of the data at once are
            refused: ``stratified``, ``max_examples``, a threshold at the ``median``. ``workers`` may be 1: one process
            reads, tokenises and collates.

    Raises:
        ValueError: for such settings, and for sources that can only be read whole.
    """

    streams = True

    def __init__(
        self, source: Source | Files, val: Files | None = None, *, shuffle_buffer: int = 10_000, **options: Any
    ) -> None:
        check_whole("data.shuffle_buffer", shuffle_buffer, 1)
        for name, expected, refused in (
            ("max_examples", "null", options.get("max_examples") is not None),
            ("stratified", "false", options.get("stratified", False)),
            ("workers", "0 or 1", options.get("workers", 0) > 1),
        ):
            if refused:
                raise ValueError(f"data.{name}: expected {expected} with data.streaming=true, found {options[name]!r}")
        super().__init__(source, val, **options)
        settings = {**vars(self.preparation), "keep_together": self._keep_together}
        self.preparation = StreamPreparation(shuffle_buffer=shuffle_buffer, **settings)
        self._counted: Callable[[], Counted] = Counted
        self._before: Counter[str] = Counter()

    def plan(self, *, epochs: int | None, max_steps: int, accumulate: int, world_size: int) -> int:
        """Fix the number of optimizer steps to ``max_steps``; the other settings are ignored.

        Raises ``ValueError`` without ``max_steps``, as the number of examples in an epoch is not known.
        """
        self._plan, self._planned_by_command = replace(self._plan, steps=_checked(max_steps)), True
        return self.steps

    def _plan_epochs(self, trainer: pl.Trainer) -> None:
        self._plan = replace(self._plan, steps=_checked(trainer.max_steps))

    def state_dict(self) -> dict[str, Any]:
        """The steps and the counts of used examples, which Lightning saves in the checkpoint."""
        return {**super().state_dict(), "used": dict(self._used())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ``ValueError`` as ``check_state`` does."""
        super().load_state_dict(state)
        self._before = Counter(state["used"])

    def tokens_in(self, steps: int) -> int:
        """Tokens that the steps so far have read, on all ranks."""
        return self._used()["tokens"]

    def rows_read(self) -> ChosenRows:
        """Raises ``ValueError``: the rows are not known before training."""
        raise ValueError(
            "model.reference: expected a reference that is not computed beforehand with data.streaming=true, found "
            "cached; in Python use Backbone.from_pretrained(path, reference='live')"
        )

    def train_dataloader(self) -> StreamLoader:
        """All micro-batches of the run for this rank, as one Lightning epoch."""
        prepared = self.prepared
        assert isinstance(prepared, PreparedStream)
        batches = StreamBatches(prepared.stream_rows, self._division(), self._collate(self.batch_size))
        loader = StreamLoader(batches, **self._loader_options())
        self._counted = lambda: loader.counted
        return loader

    def take_account(self) -> bool:
        """Update the report with the counts so far, and return whether anything was read."""
        counted, intake = self._counted(), self.prepared.intake
        dropped = sum((origin.dropped for origin in counted.origins.values()), Counter())
        intake.reports["train"] = Counter({"passes": counted.passes}) + counted.read + dropped + self._used()
        intake.origins["train"] = counted.origins
        return counted.passes > 0

    def _used(self) -> Counter[str]:
        return self._before + self._counted().used


def _checked(max_steps: int) -> int:
    if max_steps < 1:
        raise ValueError(
            "trainer.max_steps: expected the number of steps of the run with data.streaming=true, as the number of "
            f"steps in an epoch is not known; found {max_steps}"
        )
    return max_steps
