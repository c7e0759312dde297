"""The records that a command works on: a split of a data source, as a training run would split it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from halos.building import SOURCE_KEYS, build
from halos.data.feedback import Feedback, Prompt, prompt_key
from halos.data.intake import first_records
from halos.data.records import loose_prompt
from halos.data.sources import Source
from halos.data.split import split_by_prompt
from halos.data.tokens import Limits
from halos.evaluation.policies import Policy


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt, and the id of the first record that it stands in."""

    id: str
    prompt: Prompt


@dataclass(frozen=True, slots=True)
class HeldData:
    """The records of one split, and where they come from."""

    source: Source
    limits: Limits
    records: Sequence[Feedback]


def read_data(node: DictConfig | None, policy: Policy | None, split: str, seed: int) -> HeldData:
    """The split ``val`` or ``train`` of the data given, or else of the data that the policy was trained on.

    Raises ``ValueError`` if there is no data, or nothing held out.
    """
    if split not in ("val", "train"):
        raise ValueError(f"split: expected val or train, found {split!r}")
    if node is None and policy is not None and policy.run is not None:
        node, seed = policy.run.data, policy.run.seed
    if node is None:
        raise ValueError("data: expected data=toy, data=json data.val=FILE, …; only a run's folder brings its own")
    module: Any = build(node, without=SOURCE_KEYS, seed=seed)
    streamed = bool(node.get("streaming", False))
    records = _records(module.source, split, int(node.val_size), seed, streamed=streamed)
    return HeldData(module.source, module.limits, records)


def _records(source: Source, split: str, val_size: int, seed: int, *, streamed: bool = False) -> Sequence[Feedback]:
    held = source.val()
    if split == "val" and held is not None:
        return held.records
    if held is None and val_size and streamed:
        first = first_records(source, val_size)
        prompts = {loose_prompt(record.prompt) for record in first}
        rest = (record for record in source.stream({}) if loose_prompt(record.prompt) not in prompts)
        return first if split == "val" else list(rest)
    train = source.train().records
    if held is None and val_size:
        kept, out = split_by_prompt(train, val_size, seed)
        return out if split == "val" else kept
    if split == "val":
        raise ValueError("split: expected held-out records; set data.val=FILE or data.val_size=N, or split=train")
    return train


def distinct_prompts(records: Sequence[Feedback], size: int | None, seed: int) -> list[Asked]:
    """At most ``size`` different prompts, drawn with the seed, in the order of the records.

    Raises ``ValueError`` if there are none.
    """
    if size is not None and size < 1:
        raise ValueError(f"size: expected a number of prompts from 1 on or null, found {size}")
    asked: dict[str, Asked] = {}
    for record in records:
        asked.setdefault(prompt_key(record.prompt), Asked(record.id, record.prompt))
    found = list(asked.values())
    if not found:
        raise ValueError("split: expected records with prompts, found none")
    if size is None or size >= len(found):
        return found
    return [found[i] for i in sorted(random.Random(seed).sample(range(len(found)), size))]
