"""Prompts to sample completions for, from a split of a data source."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from halos.checks import check_whole
from halos.data.preparation.intake import LEAKED, Intake, read, read_held
from halos.data.preparation.prepare import Preparation
from halos.data.records.record import Prompt, Record, prompt_key
from halos.data.records.table import loose_prompt, table_of
from halos.data.rows.chat_tokens import Limits
from halos.data.sources.base import Source
from halos.data.streaming.preparation import StreamPreparation
from halos.data.views.selection import Selection


@dataclass(frozen=True, slots=True)
class SourcePrompt:
    """A prompt to sample completions for.

    Attributes:
        id: the id of the first record with this prompt.
        prompt: its text or turns.
    """

    id: str
    prompt: Prompt


@dataclass(frozen=True, slots=True)
class HeldData:
    """The records of one split and how the training run reads them.

    Attributes:
        source: where the records come from.
        limits: token limits of prompts and completions.
        text: ``plain`` or ``rendered``, as ``data.text``.
        records: the records of the split.
        training: the training records, which set the median of scores.
        selection: which part of the feedback is used.
        report: how many records were left out of the split, by reason.
    """

    source: Source
    limits: Limits
    text: str
    records: Sequence[Record]
    training: Sequence[Record]
    selection: Selection
    report: Counter[str]


def read_split(preparation: Preparation, split: str) -> HeldData:
    """Read the records of a split exactly as a training run splits them.

    Args:
        preparation: how the run reads its data.
        split: ``val`` or ``train``.

    Raises:
        ValueError: the split has another name, or no records are held out.
    """
    if split not in ("val", "train"):
        raise ValueError(f"split: expected val or train, found {split!r}")
    source = preparation.source
    if isinstance(preparation, StreamPreparation):
        intake = _read_stream(source, split, preparation.val_size)
    else:
        intake = read(source, val_size=preparation.val_size, seed=preparation.seed, strict=False)
    if split not in intake.records:
        raise ValueError("split: expected held-out records; set data.val=FILE or data.val_size=N, or split=train")
    records = intake.records[split]
    # A stream has no training records in memory; a median of their scores has been refused before.
    training = intake.records.get("train", records)
    left_out = +Counter({LEAKED: intake.reports[split][LEAKED]})
    return HeldData(source, preparation.limits, preparation.text, records, training, preparation.selection, left_out)


def _read_stream(source: Source, split: str, val_size: int) -> Intake:
    intake = read_held(source, val_size=val_size, strict=False)
    if split == "train":
        # The validation records come first in a stream, so training leaves out their prompts, not the other way around.
        held_prompts = {loose_prompt(record.prompt) for record in intake.records.get("val", ())}
        rest = [record for record in source.stream({}) if loose_prompt(record.prompt) not in held_prompts]
        intake.records["train"], intake.reports["train"] = table_of(rest), Counter()
    return intake


def distinct_prompts(records: Sequence[Record], size: int | None, seed: int) -> list[SourcePrompt]:
    """Draw up to ``size`` different prompts with the seed; they keep the order of the records.

    Args:
        records: where the prompts come from.
        size: the number of prompts; None for all.
        seed: the seed of the draw.

    Raises:
        ValueError: ``size`` is not a whole number from 1 on, or there are no prompts.
    """
    check_whole("size", size, 1, null=True)
    # By key, so that a text and the same text as a lone user turn are one prompt.
    first_with: dict[str, SourcePrompt] = {}
    for record in records:
        first_with.setdefault(prompt_key(record.prompt), SourcePrompt(record.id, record.prompt))
    prompts = list(first_with.values())
    if not prompts:
        raise ValueError("split: expected records with prompts, found none")
    if size is None or size >= len(prompts):
        return prompts
    # Indices are drawn and sorted, not prompts, so that the prompts stay in the order of the records, whatever the
    # size.
    return [prompts[i] for i in sorted(random.Random(seed).sample(range(len(prompts)), size))]
