"""Feedback → records → view → token rows: the preparation of the data, which needs a tokenizer but no model.

    Preparation (settings) → prepare(needs, tokenizer) → Prepared (token rows and a report)

The result is the same on every rank, and does not change afterwards.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from halos.checks import check_whole
from halos.data.preparation.cautions import warn_of_one_class
from halos.data.preparation.graded import check_graded
from halos.data.preparation.hygiene import origin_of
from halos.data.preparation.intake import Intake, read
from halos.data.preparation.join_views import joined, of_view
from halos.data.preparation.needs import DataNeeds
from halos.data.reading.lines import USUAL, ReadingLimits
from halos.data.records.record import Prompt
from halos.data.records.table import RecordTable
from halos.data.rows.chat_tokens import ChatTokens, Limits, check_text
from halos.data.rows.token_rows import Row
from halos.data.rows.tokenise import SplitRows, make_rows
from halos.data.sources.base import Source
from halos.data.store.arrow import MEMORY, Store
from halos.data.views.derive import VIEWS
from halos.data.views.examples import Example, Examples
from halos.data.views.joint_examples import JointExamples
from halos.data.views.selection import Selection
from halos.data.views.turns import expand_turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_PROMPTS = 1024
"""The maximum number of prompts kept for sampling replies during training."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """The token rows of a run, with a report of how they were made.

    Attributes:
        needs: the needs of the objective that the rows were made for.
        tokenizer: the tokenizer of the rows.
        rows: the token rows of each split, except the training rows of a stream.
        intake: counts of what was read, converted, cut and left out.
        label_counts: numbers of desirable and undesirable training completions by weight, for views with labels.
        prompts: prompts to sample replies to, in an order drawn with the seed; held-out ones if there are any.
    """

    needs: DataNeeds
    tokenizer: PreTrainedTokenizerBase
    rows: Mapping[str, SplitRows]
    intake: Intake
    label_counts: tuple[float, float] | None
    prompts: Sequence[Prompt]

    def keys(self) -> dict[str, str]:
        """For each split, a hash of everything that a run reads from it."""
        return {split: rows.table.digest() for split, rows in self.rows.items()}

    def example(self) -> Row:
        """The first row of the training data."""
        return self.rows["train"].table[0]

    def longest(self) -> int:
        """Tokens of the longest sequence, prompt and completion, that a model will read."""
        return max(rows.table.longest() for rows in self.rows.values())


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How feedback becomes token rows; see :class:`halos.data.PreferenceDataModule` for the settings.

    Raises ``ValueError`` for settings that the source does not allow.
    """

    source: Source
    limits: Limits
    selection: Selection = field(default_factory=Selection)
    max_examples: int | None = None
    max_val_examples: int | None = None
    val_size: int = 0
    strict: bool = False
    train_on: str = "last"
    text: str = "plain"
    store: Store = MEMORY
    reading: ReadingLimits = USUAL
    seed: int = 0

    def __post_init__(self) -> None:
        check_text(self.text)
        check_whole("data.max_examples", self.max_examples, 1, null=True)
        check_whole("data.max_val_examples", self.max_val_examples, 1, null=True)
        check_whole("data.val_size", self.val_size, 0)
        check_whole("data.num_proc", self.store.workers, 1, null=True)
        if self.train_on == "all" and self.source.whole_trees:
            raise ValueError(
                f"data.train_on: expected last with data={self.source.name}, found all: the earlier turns of its trees "
                "are completions of other records already, or were left out as others were preferred to them"
            )

    def read(self) -> Intake:
        """Read the records of both splits and check them for duplicates, contradictions and leaks.

        Raises ``ValueError`` with file and line for bad records.
        """
        self.source.store, self.source.reading = self.store, self.reading
        intake = read(self.source, val_size=self.val_size, seed=self.seed, strict=self.strict)
        intake.examine()
        return intake

    def derive(self, intake: Intake, needs: DataNeeds) -> None:
        """Replace the records of the intake by the view's examples; for several views, by records with their examples.

        Raises:
            ValueError: if the records have no example of a view, or for settings that have no effect on any view.
        """
        each = needs.each()
        views = [view_needs.view for view_needs in each]
        self.selection.check(*views)
        if self.train_on not in ("last", "all"):
            raise ValueError(f"data.train_on: expected last or all, found {self.train_on!r}")
        if self.train_on == "all" and views != ["demonstrations"]:
            raise ValueError(
                "data.train_on=all is for losses that imitate (loss=sft); people judged only the last turn, and this "
                f"loss learns from {' and '.join(views)}"
            )
        for split, records in intake.records.items():
            counts: Counter[str] = Counter()
            # A median is always that of the training scores. Otherwise the labels of validation data would have
            # another meaning.
            training = intake.records.get("train", records)
            if self.train_on == "all":
                records, counts = expand_turns(records, self.store)
            derived: list[Examples[Example]] = []
            for view_needs in each:
                examples, report = self._view(view_needs, split, records, training)
                derived.append(examples)
                counts.update(of_view(view_needs.name, report) if needs.views else report)
            split_examples = JointExamples(tuple(derived)) if needs.views else derived[0]
            max_size = self.max_examples if split == "train" else self.max_val_examples
            intake.examples[split] = _sample(split_examples, max_size, self.seed)
            for view_needs, examples in zip(each, intake.examples[split].views, strict=True):
                weighted = +Counter({"examples with a weight": int((examples.weights != 1).sum())})
                counts.update(of_view(view_needs.name, weighted) if needs.views else weighted)
            intake.reports[split] += counts
        intake.records = {}  # frees the columns of numbers, which are long for a large data set

    def _view(
        self, needs: DataNeeds, split: str, records: RecordTable, training: RecordTable
    ) -> tuple[Examples[Example], Counter[str]]:
        """Return the examples of one view of a split, and counts of what was converted or left out."""
        source_records, places = self._of_source(needs.source, records)
        prepare = self.selection.prepare(needs.view, source_records, self._of_source(needs.source, training)[0])
        examples, report = VIEWS[needs.form](source_records, prepare)
        if needs.flags.step_labels and split == "train" and not report["steps with a label"]:
            raise ValueError(
                "loss.step_labels: expected completions whose steps have labels (data.columns.steps=…), found none; "
                "loss=kto learns from whole completions"
            )
        if needs.source is not None:
            examples = examples.within(records, places)
        # keep() draws from training data only, so that the metrics of validation data can be compared between runs.
        if split != "train":
            return examples, report
        selected, left_out = self.selection.keep(examples, self.seed)
        return selected, report + left_out

    def _of_source(self, name: str | None, records: RecordTable) -> tuple[RecordTable, np.ndarray]:
        """Return the records of one source of ``data=mix`` (None: of all), and their places in ``records``."""
        if name is None:
            return records, np.arange(len(records))
        places = np.flatnonzero(np.isin(records.numbers("name"), self.source.names_of(name)))
        return records.take(places), places

    def leave_out_steps(self, intake: Intake, needs: DataNeeds, tokenizer: PreTrainedTokenizerBase) -> None:
        """Leave out labelled steps that the length limits cut off, or that have no token of their own.

        Raises ``ValueError`` if no example of a split is left.
        """
        tokens = self.tokens(tokenizer)
        for split, examples in intake.examples.items():
            views = list(examples.views)
            for n, view_needs in enumerate(needs.each()):
                if not view_needs.flags.step_labels:
                    continue
                # Without a cache the rows are made twice: here, and again for the steps that remain.
                rows = make_rows(views[n], tokens, control=needs.control, store=self.store).table.views[0]
                reasons = rows.unlearnable_steps()
                learnable = np.flatnonzero(~np.any(list(reasons.values()), axis=0))
                if not len(learnable):
                    expected = f"expected a step that fits into {self.limits.max_length} tokens with its prompt"
                    raise ValueError(f"data.max_length: {expected}, found none in the {split} data")
                views[n] = views[n].take(learnable)
                report = {reason: int(of_rows.sum()) for reason, of_rows in reasons.items()}
                intake.reports[split] += Counter(of_view(view_needs.name, report) if needs.views else report)
            intake.examples[split] = JointExamples(tuple(views)) if needs.views else views[0]

    def tokenise(self, intake: Intake, needs: DataNeeds, tokenizer: PreTrainedTokenizerBase) -> dict[str, SplitRows]:
        """Replace the examples of the intake by token rows.

        Raises ``ValueError`` for a prompt over the limits, with the id of its example.
        """
        tokens = self.tokens(tokenizer)
        origins = [file for files in intake.origins.values() for file in files]
        splits: dict[str, SplitRows] = {}
        for split, examples in intake.examples.items():
            views: list[SplitRows] = []
            for view_needs, view_examples in zip(needs.each(), examples.views, strict=True):
                rows = make_rows(
                    view_examples,
                    tokens,
                    control=needs.control,
                    mismatched_seed=self.seed if view_needs.flags.mismatched else None,
                    origin=partial(origin_of, origins=origins),
                    store=self.store,
                )
                check_graded(rows.table, view_needs)
                views.append(rows)
            splits[split] = rows = views[0]
            if isinstance(examples, JointExamples):
                splits[split] = rows = joined([(v.view, v.name) for v in needs.views], views, examples)
            intake.reports[split] += Counter({"examples": len(rows)}) + rows.report
            intake.tokenised(split, rows)
        intake.examples = {}  # frees the texts: from here on only the rows are read
        return splits

    def tokens(self, tokenizer: PreTrainedTokenizerBase) -> ChatTokens:
        """Return the object that turns the data's texts into token ids."""
        return ChatTokens(tokenizer, self.limits, self.text)

    def prepare(self, needs: DataNeeds, tokenizer: PreTrainedTokenizerBase) -> Prepared:
        """Read the records, derive the view and tokenise it. Raises ``ValueError`` for bad data."""
        intake = self.read()
        self.derive(intake, needs)
        self.leave_out_steps(intake, needs, tokenizer)
        train = intake.examples["train"]
        # Labels and prompts are taken first: tokenise releases the examples.
        label_counts = None
        for examples in train.views:
            if (labels := examples.labels) is not None:
                weights = examples.weights
                label_counts = (float(weights[labels].sum()), float(weights[~labels].sum()))
                warn_of_one_class(f"{len(labels):,} training completions", labels)
        prompts = drawn_prompts(intake.examples.get("val", train), self.seed)
        rows = self.tokenise(intake, needs, tokenizer)
        return Prepared(needs, tokenizer, rows, intake, label_counts, prompts)


def _sample(
    examples: Examples[Example] | JointExamples, max_size: int | None, seed: int
) -> Examples[Example] | JointExamples:
    if max_size is None or max_size >= len(examples):
        return examples
    # Sorted, so that a limit leaves out examples without reordering the others.
    return examples.take(np.array(sorted(random.Random(seed).sample(range(len(examples)), max_size))))


def drawn_prompts(examples: Examples[Example] | JointExamples, seed: int) -> list[Prompt]:
    """Return up to MAX_PROMPTS different prompts, drawn with the seed, in random order."""
    _, first = np.unique(examples.prompts, return_index=True)
    drawn = random.Random(seed).sample(np.sort(first).tolist(), min(len(first), MAX_PROMPTS))
    return [example.prompt for example in examples.many(np.array(drawn))]
