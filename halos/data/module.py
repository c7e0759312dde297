"""The DataModule: reads feedback from a source, derives the view that an objective takes, and batches it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader

from halos.caches import Seals
from halos.checks import check_whole
from halos.data.batches.batch import Batch
from halos.data.batches.collate import Batches, collate
from halos.data.batches.loader import ResumableLoader
from halos.data.batches.order import Division, StratifiedOrder, TrainingOrder, validation_order
from halos.data.batches.reference_table import ReferenceTable
from halos.data.batches.step_plan import StepPlan, fewest_steps, plan_of_trainer
from halos.data.preparation.needs import DataNeeds
from halos.data.preparation.prepare import Preparation, Prepared
from halos.data.reading.lines import USUAL, ReadingLimits
from halos.data.rows.chat_tokens import Limits
from halos.data.rows.chosen import ChosenRows
from halos.data.rows.joint_rows import JointRows
from halos.data.rows.token_rows import Row, TokenRows
from halos.data.rows.tokenise import SplitRows
from halos.data.sources.base import Source
from halos.data.sources.feedback_files import FeedbackFiles
from halos.data.sources.file_source import Files
from halos.data.store.arrow import Store, cache_folder
from halos.data.views.selection import Selection
from halos.processes.collectives import data_ranks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


class PreferenceDataModule(pl.LightningDataModule):
    """Human feedback in batches for an objective.

    Under a plain ``Trainer.fit(objective, datamodule=data)`` the data are prepared when the fit begins, because the
    objective's view and tokenizer are known then. An epoch of the Trainer has
    ⌈examples / examples per step⌉ optimizer steps: it reads every example, and its last step may reach into the next
    pass over the data. The data module divides the examples over the ranks itself, so Lightning's
    ``DistributedSampler`` is switched off.

    Args:
        source: one or several files in any recognised layout (docs/data.md), or a :class:`halos.data.Source`.
        val: files of validation data, where ``source`` names files.
        batch_size: examples per device and micro-step.
        max_length: the maximum number of tokens of prompt and completion together.
        max_prompt_length: the maximum number of tokens of the prompt; longer prompts are cut at their start. None:
            prompts are not cut, and every prompt has to fit into ``max_length``.
        max_examples, max_val_examples: up to this many examples of each split, drawn with the seed.
        val_size: records held out of the training data, by prompt, where the source has no validation data.
        strict: raise an error for faulty records instead of leaving them out.
        train_on: the ``last`` assistant turn of a conversation or, for demonstrations, ``all`` of them.
        text: ``plain`` texts are rendered by the chat template; ``rendered`` texts contain its markup already.
        select: rules that select the feedback to use.
        stratified: every step has a desirable and an undesirable completion.
        keep_together: up to this many examples of one conversation (whose prompts begin with the same user turn) are
            drawn together, so that a micro-batch computes their common tokens once; 1 draws every example separately.
            Ignored for an objective that needs all examples of a prompt in one step, and with ``stratified``, which
            draws every example separately.
        length_groups: number of parts into which a padded micro-batch is divided by length. Results do not depend on
            it.
        packing: concatenate rows without padding, for models that support it; other models get padded rows.
        share_prompts: in packed rows, compute what several sequences of a micro-batch begin with only once: a prompt
            for all its completions, the turns of a conversation for all its examples.
        max_tokens_per_batch: the maximum number of tokens whose activations are in memory at a time (a single example
            may exceed it). A larger micro-batch is computed in parts, and each part is recomputed in the backward pass;
            results do not depend on it. Only for packed rows, and for models that are not sharded over devices.
        workers: processes that collate batches.
        num_proc: processes that prepare data; None: one for each core.
        max_expansion, max_characters: limits of a file's decompressed size and of a record's length; see
            :class:`halos.data.reading.lines.ReadingLimits`.
        cache_dir: folder in which prepared data and the reference's log-probs are kept; ``auto`` is ``$HALOS_CACHE`` or
            ``~/.cache/halos``, None keeps them in memory.
        cache_key_file: file with the key by which a group shares the cache folder; None: only files that this user has
            written are used.
        seed: seed of the order of examples, of the split and of the mismatched completions.

    Raises:
        ValueError: for an invalid setting, and from ``prepare`` for bad data.
    """

    streams = False
    """Whether training data are read during training."""

    def __init__(
        self,
        source: Source | Files,
        val: Files | None = None,
        *,
        batch_size: int = 8,
        max_length: int = 512,
        max_prompt_length: int | None = None,
        max_examples: int | None = None,
        max_val_examples: int | None = None,
        val_size: int = 0,
        strict: bool = False,
        train_on: str = "last",
        text: str = "plain",
        select: Selection | None = None,
        stratified: bool = False,
        keep_together: int = 2,
        length_groups: int = 4,
        packing: bool = True,
        share_prompts: bool = True,
        max_tokens_per_batch: int | None = None,
        workers: int = 0,
        num_proc: int | None = None,
        max_expansion: int = USUAL.max_expansion,
        max_characters: int = USUAL.max_characters,
        cache_dir: str | Path | None = "auto",
        cache_key_file: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_whole("data.batch_size", batch_size, 1)
        check_whole("data.keep_together", keep_together, 1)
        check_whole("data.length_groups", length_groups, 1)
        check_whole("data.max_tokens_per_batch", max_tokens_per_batch, 1, null=True)
        check_whole("data.workers", workers, 0)
        if max_tokens_per_batch is not None and not packing:
            raise ValueError("data.max_tokens_per_batch: expected packed rows (data.packing=true), found false")
        if not isinstance(source, Source):
            source = FeedbackFiles(source, val)
        elif val is not None:
            raise ValueError("data.val: expected null with a Source, which has its own validation data; found files")
        self.cache_dir, self.seals = cache_folder(cache_dir), Seals.of_file(cache_key_file)
        self.preparation = Preparation(
            source=source,
            limits=Limits(max_length, max_prompt_length),
            selection=select or Selection(),
            max_examples=max_examples,
            max_val_examples=max_val_examples,
            val_size=val_size,
            strict=strict,
            train_on=train_on,
            text=text,
            store=Store(self.cache_dir, num_proc, self.seals),
            reading=ReadingLimits(max_expansion, max_characters),
            seed=seed,
        )
        self.batch_size, self.length_groups, self.workers, self.seed = batch_size, length_groups, workers, seed
        self.packing, self.share_prompts, self.max_tokens = packing, share_prompts, max_tokens_per_batch
        self._stratified, self._keep_together = stratified, keep_together
        self._prepared: Prepared | None = None
        self._prepared_by_hand = False
        self._plan = StepPlan(per_step=batch_size)
        self._planned_by_command = False
        self._objective: pl.LightningModule | None = None
        self.reference: ReferenceTable | None = None
        """The reference's log-probs of :meth:`rows_read`, where they are computed before training."""

    # What is prepared

    def prepare(self, needs: DataNeeds, tokenizer: PreTrainedTokenizerBase) -> Prepared:
        """Read the data and make token rows, before any model is needed.

        Raises:
            ValueError: for bad records, with file and line; for records from which the view cannot be derived; for a
                prompt over the limits, with the id of its example.
        """
        self._prepared_by_hand = True
        return self._prepare(needs, tokenizer)

    def _prepare(self, needs: DataNeeds, tokenizer: PreTrainedTokenizerBase) -> Prepared:
        self.reference = None
        if needs.flags.last_hidden and self.max_tokens is not None:
            raise ValueError(
                "data.max_tokens_per_batch: expected a loss on completions' log-probs; this one reads their "
                "last states, which needs padded rows"
            )
        self._prepared = self.preparation.prepare(needs, tokenizer)
        return self._prepared

    @property
    def prepared(self) -> Prepared:
        """The result of :meth:`prepare`. Raises ``ValueError`` if it was not called yet."""
        if self._prepared is None:
            raise ValueError("expected prepared data: call prepare(needs, tokenizer), or Trainer.fit, which calls it")
        return self._prepared

    @property
    def rows(self) -> Mapping[str, SplitRows]:
        """The token rows of each split."""
        return self.prepared.rows

    @property
    def label_counts(self) -> tuple[float, float] | None:
        """Desirable and undesirable training completions by weight, for views with labels."""
        return None if self._prepared is None else self._prepared.label_counts

    # Steps

    @property
    def steps(self) -> int:
        """Optimizer steps of the run; 0 until it is planned."""
        return self._plan.steps

    def plan(self, *, epochs: int | None, max_steps: int, accumulate: int, world_size: int) -> int:
        """Fix the number of optimizer steps of a run of the command, which is one Lightning epoch.

        Args:
            epochs: passes over the data; the steps of all passes are rounded up once.
            max_steps: the maximum number of optimizer steps; -1: no maximum.
            accumulate: micro-batches in an optimizer step.
            world_size: ranks with data of their own.

        Raises:
            ValueError: if there is no step, or no order of the examples that meets the settings.
        """
        per_step = self.batch_size * accumulate * world_size
        passes = None if epochs is None else math.ceil(epochs * len(self.rows["train"]) / per_step)
        steps = fewest_steps(passes, epochs, max_steps)
        if steps < max_steps:
            warning = "trainer.max_steps=%d: the run has %d steps, as trainer.max_epochs=%s takes no more"
            log.warning(warning, max_steps, steps, epochs)
        self._planned_by_command = True
        self._fix_plan(StepPlan(steps=steps, per_step=per_step), world_size)
        return steps

    def _plan_epochs(self, trainer: pl.Trainer) -> None:
        world_size = data_ranks(trainer)[1]
        per_step = self.batch_size * trainer.accumulate_grad_batches * world_size
        self._fix_plan(plan_of_trainer(trainer, examples=len(self._train), per_step=per_step), world_size)

    def _fix_plan(self, plan: StepPlan, world_size: int) -> None:
        if plan != self._plan:
            self.reference = None  # its rows are not those of the new plan
        self._plan = plan
        # Settings for which no order exists raise their error here, not in the first step.
        self.order()
        if "val" in self.rows:
            validation_order(len(self.rows["val"]), Division(batch_size=self.batch_size, world_size=world_size))

    def passes(self, steps: int) -> float | None:
        """Passes over the training examples in this number of optimizer steps; None for a stream."""
        return None if self.streams else steps * self._plan.per_step / len(self._train)

    def tokens_in(self, steps: int) -> int:
        """Tokens (prompts and completions) that the first ``steps`` optimizer steps read, on all ranks."""
        return int(self._train.tokens()[self._indices(steps)].sum())

    def rows_read(self) -> ChosenRows:
        """The rows that the planned run reads in training and validation, on all ranks."""
        chosen = [(self._train, np.unique(self._indices(self.steps)))]
        if "val" in self.rows:
            chosen.append((self.rows["val"].table, np.arange(len(self.rows["val"].table))))
        return ChosenRows(chosen)

    def _indices(self, steps: int) -> np.ndarray:
        order = self.order() if steps else ()
        return np.array([i for micro in islice(order, steps) for i in micro.rows], dtype=np.int64)

    def order(self, division: Division | None = None) -> TrainingOrder:
        """Return the order of training: which rows make up each micro-batch.

        Args:
            division: how the run is divided, for one rank; None: each step is one micro-batch of all ranks' examples.
        """
        rows, grouped = self._train, self.prepared.needs.flags.grouped
        division = division or Division(batch_size=self._plan.per_step, steps=self.steps, seed=self.seed)
        if self._stratified:
            labels = np.full(len(rows), -1) if grouped else rows.labels
            return StratifiedOrder(len(rows), division, labels=labels)
        if grouped:
            return TrainingOrder(len(rows), division, groups=rows.groups)
        return TrainingOrder(len(rows), division, groups=rows.conversations, together=self._keep_together)

    @property
    def _train(self) -> TokenRows | JointRows:
        return self.rows["train"].table

    # What Lightning calls

    def setup(self, stage: str) -> None:
        """Prepare the data for the Trainer's objective, unless that is done, and plan the steps of a plain Trainer.

        Raises:
            ValueError: as :meth:`prepare` does, and if the data were prepared for another view or tokenizer.
        """
        trainer = self._trainer()
        if overfit := getattr(trainer, "overfit_batches", 0):
            raise ValueError(
                f"overfit_batches: expected 0, found {overfit}, for which Lightning reorders the data; use "
                "max_examples of the data module"
            )
        # Each rank reads its own micro-batches already. Lightning's sampler would shuffle and divide them once more.
        trainer._accelerator_connector.use_distributed_sampler = False
        self._prepare_for(trainer.lightning_module)
        if trainer.lightning_module is not self._objective:
            self.reference = None  # another objective's reference is another model
        self._objective = trainer.lightning_module
        if stage == "fit" and not self._planned_by_command:
            self._plan_epochs(trainer)

    def _prepare_for(self, objective: Any) -> None:
        if not hasattr(objective, "data_needs"):
            raise ValueError(
                f"expected an objective of halos (halos.KTO, …), found {type(objective).__name__}; this data module "
                "makes batches for objectives"
            )
        needs, tokenizer = objective.data_needs(), objective.ready_tokenizer()
        if self._prepared is None:
            self._prepare(needs, tokenizer)
            return
        same_needs = self._prepared.needs.key() == needs.key()
        before = self._prepared.tokenizer
        # Keys hash the whole tokenizer. They are not needed if it is the same object, as in the calls of one run.
        if same_needs and (before is tokenizer or self._token_key(before) == self._token_key(tokenizer)):
            return
        if self._prepared_by_hand:
            raise ValueError(
                f"expected data prepared for {type(objective).__name__} (view {needs.view!r}), found data prepared for "
                f"view {self._prepared.needs.view!r} or another tokenizer; make another {type(self).__name__}, and "
                "leave prepare() to the Trainer"
            )
        self._prepare(needs, tokenizer)

    def _token_key(self, tokenizer: PreTrainedTokenizerBase) -> str:
        return self.preparation.tokens(tokenizer).key

    def state_dict(self) -> dict[str, int]:
        """The planned and the completed optimizer steps, which Lightning saves in the checkpoint."""
        return {"planned": self.steps, "done": self._trainer().global_step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Raises ``ValueError`` as :meth:`check_state` does."""
        self.check_state(state)

    def check_state(self, state: Mapping[str, int]) -> None:
        """Raise ``ValueError`` if the number of steps has changed and the checkpoint completes either plan."""
        done = state["done"]
        if self.steps != state["planned"] and done >= min(self.steps, state["planned"]):
            raise ValueError(
                f"resume: the checkpoint was saved after {done} of {state['planned']} steps, but {self.steps} are "
                "asked for (trainer.max_steps, trainer.max_epochs); a complete run cannot be made longer or shorter: "
                "start another from its model (model=hf model.path=OUTPUT_DIR/model)"
            )

    def train_dataloader(self) -> ResumableLoader:
        """All micro-batches of the run for this rank, divided into the planned Lightning epochs."""
        division = self._division()
        epoch = None if self._plan.epoch_steps is None else self._plan.epoch_steps * division.accumulate
        batches = self._batches(self._train)
        return ResumableLoader(batches, self.order(division), epoch=epoch, **self._loader_options())

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Every validation example once, always in the same batches."""
        if "val" not in self.rows:
            return []
        rows = self.rows["val"].table
        order = validation_order(len(rows), self._division())
        return DataLoader(self._batches(rows), sampler=order, batch_size=None, **self._loader_options())

    def _batches(self, rows: Sequence[Row]) -> Batches:
        # Every rank must run the same number of forwards, even if its part of a small validation step has few examples.
        return Batches(rows, self._collate(max(1, len(rows) // self._division().world_size)))

    def _collate(self, max_chunks: int) -> Callable[..., Batch]:
        needs = self.prepared.needs
        return partial(
            collate,
            chunks=min(self.length_groups, self.batch_size, max_chunks),
            mismatched=needs.flags.mismatched,
            last_hidden=needs.flags.last_hidden,
            packing=self.packing,
            share_prompts=self.share_prompts,
            max_tokens=self.max_tokens,
            reference=self.reference,
        )

    def _division(self) -> Division:
        """The part of this rank."""
        trainer = self._trainer()
        rank, world_size = data_ranks(trainer)
        return Division(
            batch_size=self.batch_size,
            accumulate=trainer.accumulate_grad_batches,
            world_size=world_size,
            rank=rank,
            steps=self.steps,
            seed=self.seed,
        )

    def _loader_options(self) -> dict[str, Any]:
        pinned = torch.cuda.is_available() and self._trainer().strategy.root_device.type == "cuda"
        return {"num_workers": self.workers, "pin_memory": pinned}

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch to the device asynchronously. Lightning would wait for each of its tensors."""
        if isinstance(batch, Batch) and device.type == "cuda":
            return batch.to(device, non_blocking=True)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def _trainer(self) -> pl.Trainer:
        if self.trainer is None:
            raise ValueError("expected the data module to be attached to a Trainer")
        return self.trainer
