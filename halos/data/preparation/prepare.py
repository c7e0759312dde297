"""Feedback → records → view → token rows: all that is done to the data before a model is needed.

    Preparation (settings) → prepare(needs, tokenizer) → Prepared (token rows and a report)

The result is the same on every rank, and does not change afterwards.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from halos.checks import check_whole
from halos.data.preparation.cautions import warn_of_one_class
from halos.data.preparation.graded import check_graded
from halos.data.preparation.hygiene import origin_of
from halos.data.preparation.intake import Intake, read
from halos.data.reading.lines import USUAL, ReadingLimits
from halos.data.records.record import Prompt
from halos.data.rows.chat_tokens import ChatTokens, Limits, check_text
from halos.data.rows.token_rows import Row
from halos.data.rows.tokenise import Rows, make_rows
from halos.data.sources.base import Source
from halos.data.store.arrow import MEMORY, Store
from halos.data.views.derive import VIEWS
from halos.data.views.examples import Example, Examples
from halos.data.views.selection import Selection
from halos.data.views.turns import expand_turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_PROMPTS = 1024
"""Prompts kept to sample replies to while training."""


def no_control_token(desirable: bool | None) -> str:
    """The control token of objectives that have none."""
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataNeeds:
    """What an objective needs of its data.

    Attributes:
        view: ``demonstrations``, ``binary``, ``pairs`` or ``scored``.
        control: maps an example's label to the text that ends its prompt (CSFT's control tokens).
        mismatched: each row has another prompt's completion as its last branch (KTO's y').
        whole_completions: batches feed each completion's last token too, for objectives that read its state.
        grouped: all completions of one prompt are in the same step.
        margins: each pair has a margin.
        pair_scores: each pair has scores in [0, 1] of both completions.
    """

    view: str
    control: Callable[[bool | None], str] = no_control_token
    mismatched: bool = False
    whole_completions: bool = False
    grouped: bool = False
    margins: bool = False
    pair_scores: bool = False

    def key(self) -> tuple[Any, ...]:
        """A key that is equal for two needs that the same rows satisfy."""
        controls = tuple(self.control(label) for label in (True, False, None))
        flags = (self.mismatched, self.whole_completions, self.grouped, self.margins, self.pair_scores)
        return self.view, controls, *flags


@dataclass(frozen=True, slots=True)
class Prepared:
    """The token rows of a run, with a report of how they were made.

    Attributes:
        needs: the needs of the objective that the rows were made for.
        tokenizer: the tokenizer of the rows.
        rows: the token rows of each split, except the training rows of a stream.
        intake: what was read, converted, cut and left out.
        label_counts: desirable and undesirable training completions by weight, for views with labels.
        prompts: prompts to sample replies to, in an order drawn with the seed; held-out ones where there are any.
    """

    needs: DataNeeds
    tokenizer: PreTrainedTokenizerBase
    rows: Mapping[str, Rows]
    intake: Intake
    label_counts: tuple[float, float] | None
    prompts: Sequence[Prompt]

    def keys(self) -> dict[str, str]:
        """For each split, a key of all that a run reads of it."""
        return {split: rows.rows.digest() for split, rows in self.rows.items()}

    def example(self) -> Row:
        """A row of the training data."""
        return self.rows["train"].rows[0]

    def longest(self) -> int:
        """Tokens of the longest sequence, prompt and completion, that a model will read."""
        return max(rows.rows.longest() for rows in self.rows.values())


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How feedback becomes token rows; see :class:`halos.data.PreferenceDataModule` for the settings.

    Raises ``ValueError`` for settings that do not go with the source.
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

    def derive(self, intake: Intake, view: str) -> None:
        """Replace the records of the intake by the view's examples.

        Raises:
            ValueError: if the records have no example of the view, or for settings that have no effect on it.
        """
        self.selection.check(view)
        if self.train_on not in ("last", "all"):
            raise ValueError(f"data.train_on: expected last or all, found {self.train_on!r}")
        if self.train_on == "all" and view != "demonstrations":
            raise ValueError(
                "data.train_on=all is for losses that imitate (loss=sft); people judged only the last turn, and this "
                f"loss learns from {view}"
            )
        for split, records in intake.records.items():
            counts: Counter[str] = Counter()
            # A median is always taken over the training scores. Otherwise the labels of validation would have another
            # meaning.
            training = intake.records.get("train", records)
            if self.train_on == "all":
                records, counts = expand_turns(records, self.store)
            examples, report = VIEWS[view](records, self.selection.prepare(view, records, training))
            counts += report
            # Validation data stays as it is, so that its metrics can be compared between runs.
            if split == "train":
                examples, not_kept = self.selection.keep(examples, self.seed)
                counts += not_kept
            max_size = self.max_examples if split == "train" else self.max_val_examples
            examples = intake.examples[split] = _sample(examples, max_size, self.seed)
            if weighted := int((examples.weights != 1).sum()):
                counts["examples with a weight"] += weighted
            intake.reports[split] += counts
        intake.records = {}  # frees the columns of numbers, which are long for a large data set

    def tokenise(self, intake: Intake, needs: DataNeeds, tokenizer: PreTrainedTokenizerBase) -> dict[str, Rows]:
        """Replace the examples of the intake by token rows.

        Raises ``ValueError`` for a prompt over the limits, with the id of its example.
        """
        tokens = self.tokens(tokenizer)
        origins = [file for files in intake.origins.values() for file in files]
        splits: dict[str, Rows] = {}
        for split, examples in intake.examples.items():
            rows = splits[split] = make_rows(
                examples,
                tokens,
                control=needs.control,
                mismatched_seed=self.seed if needs.mismatched else None,
                origin=partial(origin_of, origins=origins),
                store=self.store,
            )
            intake.reports[split] += Counter({"examples": len(rows)}) + rows.report
            intake.tokenised(split, rows)
        intake.examples = {}  # frees the texts: from here on only the rows are read
        return splits

    def tokens(self, tokenizer: PreTrainedTokenizerBase) -> ChatTokens:
        """Return what makes token ids of the data's texts."""
        return ChatTokens(tokenizer, self.limits, self.text)

    def prepare(self, needs: DataNeeds, tokenizer: PreTrainedTokenizerBase) -> Prepared:
        """Read, derive and tokenise. Raises ``ValueError`` for bad data, before any model is needed."""
        intake = self.read()
        self.derive(intake, needs.view)
        train = intake.examples["train"]
        # Labels and prompts are taken first: tokenise releases the examples.
        labels, weights = train.labels, train.weights
        label_counts = None if labels is None else (float(weights[labels].sum()), float(weights[~labels].sum()))
        if labels is not None:
            warn_of_one_class(f"{len(labels):,} training completions", labels)
        prompts = drawn_prompts(intake.examples.get("val", train), self.seed)
        rows = self.tokenise(intake, needs, tokenizer)
        for split_rows in rows.values():
            check_graded(split_rows.rows, needs)
        return Prepared(needs, tokenizer, rows, intake, label_counts, prompts)


def _sample(examples: Examples[Example], max_size: int | None, seed: int) -> Examples[Example]:
    if max_size is None or max_size >= len(examples):
        return examples
    # Sorted, so that a limit leaves out examples without reordering the others.
    return examples.take(np.array(sorted(random.Random(seed).sample(range(len(examples)), max_size))))


def drawn_prompts(examples: Examples[Example], seed: int) -> list[Prompt]:
    """Up to MAX_PROMPTS different prompts, drawn and ordered by the seed."""
    _, first = np.unique(examples.prompts, return_index=True)
    drawn = random.Random(seed).sample(np.sort(first).tolist(), min(len(first), MAX_PROMPTS))
    return [example.prompt for example in examples.many(np.array(drawn))]
