"""The one DataModule: feedback from a source, as the view that an objective asks for, in batches."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader

from halos.data.batches.collate import Batch, Batches
from halos.data.batches.loader import Resumable, ResumableLoader
from halos.data.batches.order import TrainingOrder, validation_order
from halos.data.batches.reference_table import ReferenceTable
from halos.data.batches.stratified import StratifiedOrder
from halos.data.preparation.hygiene import origin_of
from halos.data.preparation.intake import Intake, derive, read
from halos.data.records.record import Prompt
from halos.data.rows.chat_tokens import ChatTokens, Limits
from halos.data.rows.token_rows import Control, Row, Rows, make_rows
from halos.data.sources.base import Source
from halos.data.store.arrow import Store
from halos.data.views.derive import Examples
from halos.data.views.selection import Selection
from halos.processes.collectives import data_ranks

log = logging.getLogger(__name__)

SHOWN_PROMPTS = 16
"""Held-out prompts kept to sample replies to."""


class PreferenceDataModule(pl.LightningDataModule):
    """Feedback → records → view → rows → batches.

    Work is done in two calls, so that bad data is found before a tokenizer is needed and bad prompts before a model
    is: :meth:`load` reads records and derives the view, :meth:`tokenise` makes rows. Both are the same on every rank.

    Args:
        source: where feedback comes from (:mod:`halos.data.sources.base`).
        batch_size: examples per device and micro-step.
        max_length, max_prompt_length: token limits, see :class:`halos.data.rows.chat_tokens.Limits`.
        max_examples, max_val_examples: at most so many examples of each split, drawn with the seed.
        val_size: records held out of the training data, by prompt, where the source has no validation data.
        strict: raise for what would be left out because the data are at fault.
        train_on: ``last`` or, for demonstrations, ``all`` assistant turns of a conversation.
        stratified: no step lacks a desirable or an undesirable completion.
        keep_together: at most so many examples of one prompt are drawn together, so that they share it in a
            micro-batch, as the sides of a pair do; 1 draws every example by itself. Objectives that need all of a
            prompt's examples in one step get them so, and ``stratified`` draws them one by one.
        select: which of the feedback is used.
        length_groups: parts into which a micro-batch is sorted by length, each padded by itself; results do not
            depend on it.
        packing: lay rows end to end, without padding, for models that can read them so; the others, and all models
            without it, get padded parts.
        share_prompts: in packed rows, compute a prompt once for all its completions in the micro-batch.
        max_tokens_per_batch: the most tokens (of an example that has more: its own) whose activations exist at a time.
            A micro-batch with more is computed in parts, each once more in the backward pass; results do not depend
            on it. For packed rows of models that are not divided over devices.
        workers: processes that collate batches.
        num_proc: processes that prepare data; None for one on each core.
        streaming, shuffle_buffer: of runs whose training data are read as they are needed, which have
            :class:`halos.data.streaming.module.StreamingDataModule`; here they mean nothing.
        cache_dir: where what was made of files is kept, memory-mapped; None keeps it in memory.
        seed: of the order of examples, of the split and of the mismatched completions.
    """

    streams = False
    """Whether training data are read as they are needed."""

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int = 8,
        max_length: int = 512,
        max_prompt_length: int | None = None,
        max_examples: int | None = None,
        max_val_examples: int | None = None,
        val_size: int = 0,
        strict: bool = False,
        train_on: str = "last",
        stratified: bool = False,
        keep_together: int = 2,
        select: Selection | None = None,
        length_groups: int = 4,
        packing: bool = True,
        share_prompts: bool = True,
        max_tokens_per_batch: int | None = None,
        workers: int = 0,
        num_proc: int | None = None,
        streaming: bool = False,
        shuffle_buffer: int = 10_000,
        cache_dir: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("max_examples", max_examples, 1),
            ("max_val_examples", max_val_examples, 1),
            ("val_size", val_size, 0),
            ("keep_together", keep_together, 1),
            ("max_tokens_per_batch", max_tokens_per_batch, 1),
            ("length_groups", length_groups, 1),
            ("workers", workers, 0),
            ("num_proc", num_proc, 1),
            ("shuffle_buffer", shuffle_buffer, 1),
        ):
            if value is not None and (not isinstance(value, int) or value < least):
                raise ValueError(f"data.{name}: expected a whole number from {least} on, found {value!r}")
        self.source = source
        self._store = Store(None if cache_dir is None else Path(cache_dir).expanduser(), num_proc)
        self.limits = Limits(max_length, max_prompt_length)
        self.batch_size, self.length_groups, self.workers, self.seed = batch_size, length_groups, workers, seed
        self.packing, self.share_prompts, self.max_tokens = packing, share_prompts, max_tokens_per_batch
        if max_tokens_per_batch is not None and not packing:
            raise ValueError("data.max_tokens_per_batch: expected packed rows (data.packing=true), found false")
        self._most = {"train": max_examples, "val": max_val_examples}
        self._val_size, self._strict, self._train_on, self._stratified = val_size, strict, train_on, stratified
        self._keep_together = keep_together
        if train_on == "all" and source.whole_trees:
            raise ValueError(
                f"data.train_on: expected last with data={source.name}, found all: the earlier turns of its trees are "
                "completions of other records already, or were left out as others were preferred to them"
            )
        self.selection = select or Selection()
        self.shuffle_buffer = shuffle_buffer
        self.intake = Intake()
        self._examples: dict[str, Examples[Any]] = {}
        self.rows: dict[str, Rows] = {}
        self.reports: dict[str, Counter[str]] = {}
        self.label_counts: tuple[int, int] | None = None
        self.prompts: list[Prompt] = []
        self._mismatched = self._whole = self._grouped = False
        self.steps = 0
        self.reference: ReferenceTable | None = None
        """The reference's log-probs of :meth:`scored_rows`, where they were computed beforehand."""

    def read(self) -> None:
        """Read the records of both splits; :meth:`load` does, unless it was done."""
        self.source.store = self._store
        self.intake = read(self.source, val_size=self._val_size, seed=self.seed, strict=self._strict)
        self.intake.examine()
        self.reports = self.intake.reports
        self._origins = [file for files in self.intake.origins.values() for file in files]

    def load(self, view: str) -> None:
        """Read the records of both splits and derive the view's examples.

        Raises ``ValueError`` with file and line for bad records, and if the view cannot be had from them.
        """
        if not self.intake.records:
            self.read()
        self._derive(view)
        self.label_counts = _count_labels(self._examples["train"])
        self.prompts = first_prompts(self._examples.get("val", self._examples["train"]))

    def _derive(self, view: str) -> None:
        options: dict[str, Any] = {"train_on": self._train_on, "seed": self.seed, "store": self._store}
        derive(self.intake, view, selection=self.selection, most=self._most, **options)
        self._examples = self.intake.examples

    def tokenise(
        self,
        tokenizer: Any,
        *,
        control: Control = lambda _: "",
        mismatched: bool = False,
        whole: bool = False,
        grouped: bool = False,
    ) -> None:
        """Make token rows of the loaded examples, with y' for KTO's reference point if ``mismatched``.

        Batches will feed completions with their last tokens if ``whole``, and keep examples of one prompt together if
        ``grouped``. Raises ``ValueError`` naming the example for a prompt over the limits.
        """
        tokens = ChatTokens(tokenizer, self.limits)
        self._mismatched, self._whole, self._grouped = mismatched, whole, grouped
        if whole and self.max_tokens is not None:
            raise ValueError(
                "data.max_tokens_per_batch: expected a loss on completions' log-probs; this one reads their "
                "last states, which needs padded rows"
            )
        for split, examples in self._examples.items():
            seed = self.seed if mismatched else None
            options: dict[str, Any] = {"origin": partial(origin_of, origins=self._origins), "store": self._store}
            rows = make_rows(examples, tokens, control=control, mismatched_seed=seed, **options)
            self.rows[split] = rows
            self.reports[split] += Counter({"examples": len(rows)}) + rows.report
            self.intake.tokenised(split, rows)
        self._examples = self.intake.examples = {}

    def keys(self) -> dict[str, str]:
        """For each split a key of all that the run reads of it, once there are rows."""
        return {split: rows.digest() for split, rows in self.rows.items()}

    def example(self) -> Row:
        """A row of the training data."""
        return self.rows["train"].rows[0]

    def plan(self, *, epochs: int | None, max_steps: int, accumulate: int, world_size: int) -> int:
        """Fix the number of optimizer steps of the run: ``max_steps``, or (if -1) as many as ``epochs`` take."""
        per_step = self.batch_size * accumulate * world_size
        by_epochs = None if epochs is None else math.ceil(epochs * len(self.rows["train"]) / per_step)
        choices = [steps for steps in (by_epochs, None if max_steps < 0 else max_steps) if steps is not None]
        if not choices or min(choices) < 1:
            raise ValueError(
                "expected trainer.max_epochs or trainer.max_steps to give at least one step, found "
                f"max_epochs={epochs}, max_steps={max_steps}"
            )
        self.steps = min(choices)
        if self.steps < max_steps:
            log.warning(
                "trainer.max_steps=%d: the run has %d steps, as trainer.max_epochs=%s takes no more",
                *(max_steps, self.steps, epochs),
            )
        # These raise now for an order that cannot be had.
        self.order(batch_size=per_step, steps=self.steps)
        if "val" in self.rows:
            validation_order(len(self.rows["val"]), batch_size=self.batch_size, world_size=world_size, rank=0)
        return self.steps

    def longest(self) -> int:
        """The tokens of the longest sequence, prompt and completion, that a model will read."""
        tables: list[Any] = [rows.rows for rows in self.rows.values()]
        return max(table.longest() for table in tables)

    def state_dict(self) -> dict[str, int]:
        """Lightning keeps this in the checkpoint."""
        return {"planned": self.steps, "done": self._trainer().global_step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Raises ``ValueError`` as :meth:`check_state` does."""
        self.check_state(state)

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` if the checkpoint leaves nothing to do for the steps that are planned now."""
        done = state["done"]
        if self.steps != state["planned"] and done >= min(self.steps, state["planned"]):
            raise ValueError(
                f"resume: the checkpoint was saved after {done} of {state['planned']} steps, but {self.steps} are "
                "asked for (trainer.max_steps, trainer.max_epochs); a complete run cannot be made longer or shorter: "
                "start another from its model (model=hf model.path=OUTPUT_DIR/model)"
            )

    def tokens_in(self, steps: int, *, accumulate: int, world_size: int) -> int:
        """Tokens (prompts and completions) that the first ``steps`` optimizer steps read, on all ranks."""
        rows: Any = self.rows["train"].rows
        return int(rows.tokens()[self._indices(steps, accumulate, world_size)].sum())

    def scored_rows(self, *, accumulate: int, world_size: int) -> list[Row]:
        """The rows that the planned run reads, on all ranks: of its training steps and of validation."""
        rows: Any = self.rows["train"].rows
        read = rows.many(np.unique(self._indices(self.steps, accumulate, world_size)))
        return [*read, *(self.rows["val"].rows if "val" in self.rows else ())]

    def _indices(self, steps: int, accumulate: int, world_size: int) -> np.ndarray:
        whole = self.batch_size * world_size * accumulate
        return np.array([i for micro in self.order(batch_size=whole, steps=steps) for i in micro.rows], dtype=np.int64)

    def order(
        self, *, batch_size: int, steps: int, accumulate: int = 1, world_size: int = 1, rank: int = 0
    ) -> TrainingOrder:
        """Which training rows make up each micro-batch."""
        rows: Any = self.rows["train"].rows
        options: dict[str, Any] = {
            "batch_size": batch_size,
            "accumulate": accumulate,
            "world_size": world_size,
            "rank": rank,
            "steps": steps,
            "seed": self.seed,
        }
        if self._stratified:
            labels = np.full(len(rows), -1) if self._grouped else rows.labels
            return StratifiedOrder(len(rows), labels=labels, **options)
        together = None if self._grouped else self._keep_together
        return TrainingOrder(len(rows), groups=rows.groups, together=together, **options)

    def train_dataloader(self) -> Resumable:
        """All micro-batches of the run, as one Lightning epoch."""
        trainer = self._trainer()
        rank, world_size = data_ranks(trainer)
        order = self.order(
            batch_size=self.batch_size,
            accumulate=trainer.accumulate_grad_batches,
            world_size=world_size,
            rank=rank,
            steps=self.steps,
        )
        return ResumableLoader(self._batches(self.rows["train"].rows), order, **self._loader_options())

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        """Every validation example once, always in the same batches."""
        if "val" not in self.rows:
            return []
        rows = self.rows["val"].rows
        rank, world_size = data_ranks(self._trainer())
        order = validation_order(len(rows), batch_size=self.batch_size, world_size=world_size, rank=rank)
        return DataLoader(self._batches(rows), sampler=order, batch_size=None, **self._loader_options())

    def _batches(self, rows: Sequence[Row]) -> Batches:
        # Every rank must run equally many forwards, whatever its share of a small validation step.
        chunks = min(self.length_groups, self.batch_size, max(1, len(rows) // data_ranks(self._trainer())[1]))
        return Batches(rows, chunks=chunks, **self._collation())

    def _collation(self) -> dict[str, Any]:
        options: dict[str, Any] = {"packing": self.packing, "share_prompts": self.share_prompts}
        options |= {"reference": self.reference, "max_tokens": self.max_tokens}
        return options | {"mismatched": self._mismatched, "whole": self._whole}

    def _loader_options(self) -> dict[str, Any]:
        pinned = torch.cuda.is_available() and self._trainer().strategy.root_device.type == "cuda"
        return {"num_workers": self.workers, "pin_memory": pinned}

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Lightning's, which waits for each tensor of a batch that is not a tensor itself."""
        if isinstance(batch, Batch) and device.type == "cuda":
            return batch.to(device, non_blocking=True)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def _trainer(self) -> pl.Trainer:
        if self.trainer is None:
            raise ValueError("expected the data module to be attached to a Trainer")
        return self.trainer


def _count_labels(examples: Examples[Any]) -> tuple[int, int] | None:
    labels = examples.labels
    return None if labels is None else (int(labels.sum()), int((~labels).sum()))


def first_prompts(examples: Examples[Any]) -> list[Prompt]:
    """A few different prompts, in the order of the examples."""
    _, first = np.unique(examples.prompts, return_index=True)
    return [example.prompt for example in examples.many(np.sort(first)[:SHOWN_PROMPTS])]
