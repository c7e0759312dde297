"""The records that a command works on: a split of a data source, as a training run would split it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from halos.checks import check_whole
from halos.config.building import SOURCE_KEYS, build
from halos.data.preparation.intake import LEAKED, Intake, read, read_held
from halos.data.records.record import Prompt, Record, prompt_key
from halos.data.records.table import loose_prompt, table_of
from halos.data.rows.chat_tokens import Limits
from halos.data.sources.base import Source
from halos.data.views.selection import Selection
from halos.policy.lookup import Policy


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt, and the id of the first record that it stands in."""

    id: str
    prompt: Prompt


@dataclass(frozen=True, slots=True)
class HeldData:
    """The records of one split, and where they come from.

    ``training``: the records that set the median of scores. ``report``: what was left out of the split.
    """

    source: Source
    limits: Limits
    records: Sequence[Record]
    training: Sequence[Record]
    selection: Selection
    report: Counter[str]


def read_data(node: DictConfig | None, policy: Policy | None, split: str, seed: int) -> HeldData:
    """The split ``val`` or ``train`` of the data given, or else of the data that the policy was trained on.

    Raises ``ValueError`` if there is no data, or nothing held out.
    """
    if split not in ("val", "train"):
        raise ValueError(f"split: expected val or train, found {split!r}")
    if node is None and policy is not None and policy.run is not None:
        node, seed = policy.run.data, policy.run.seed
    if node is None:
        raise ValueError("data: expected data=toy, data=json data.train=FILE …; only a run's folder brings its own")
    module: Any = build(node, without=(*SOURCE_KEYS, "streaming", "shuffle_buffer"), seed=seed)
    streamed = bool(node.get("streaming", False))
    taken = _read(module.source, split, int(node.val_size), seed, streamed=streamed)
    if split not in taken.records:
        raise ValueError("split: expected held-out records; set data.val=FILE or data.val_size=N, or split=train")
    records = taken.records[split]
    training = taken.records.get("train", records)  # a stream has no median
    left_out = +Counter({LEAKED: taken.reports[split][LEAKED]})
    return HeldData(module.source, module.limits, records, training, module.preparation.selection, left_out)


def _read(source: Source, split: str, val_size: int, seed: int, *, streamed: bool) -> Intake:
    """What a training run would read; of a stream, training records only if these are asked for."""
    if not streamed:
        return read(source, val_size=val_size, seed=seed, strict=False)
    taken, held = read_held(source, val_size=val_size, strict=False)
    if split == "train":  # a stream leaves out of training what is in the validation data
        prompts = {loose_prompt(record.prompt) for record in held}
        rest = [record for record in source.stream({}) if loose_prompt(record.prompt) not in prompts]
        taken.records["train"], taken.reports["train"] = table_of(rest), Counter()
    return taken


def distinct_prompts(records: Sequence[Record], size: int | None, seed: int) -> list[Asked]:
    """At most ``size`` different prompts, drawn with the seed, in the order of the records.

    Raises ``ValueError`` if there are none.
    """
    check_whole("size", size, 1, null=True)
    asked: dict[str, Asked] = {}
    for record in records:
        asked.setdefault(prompt_key(record.prompt), Asked(record.id, record.prompt))
    found = list(asked.values())
    if not found:
        raise ValueError("split: expected records with prompts, found none")
    if size is None or size >= len(found):
        return found
    return [found[i] for i in sorted(random.Random(seed).sample(range(len(found)), size))]
