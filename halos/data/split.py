"""Holding out validation records."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from halos.data.feedback import Feedback, prompt_key


def split_by_prompt(records: Sequence[Feedback], val_size: int, seed: int) -> tuple[list[Feedback], list[Feedback]]:
    """(train, val): whole prompts are held out until ``val_size`` records are, so that no prompt is on both sides.

    Which prompts these are depends on the seed and the prompts, not on the order of the records.
    """
    if val_size < 0:
        raise ValueError(f"expected val_size to be 0 or more; found {val_size}")
    sizes = Counter(prompt_key(record.prompt) for record in records)
    order = sorted(sizes)
    random.Random(seed).shuffle(order)
    held: set[str] = set()
    count = 0
    for key in order:
        if count >= val_size:
            break
        held.add(key)
        count += sizes[key]
    train = [record for record in records if prompt_key(record.prompt) not in held]
    if not train:
        raise ValueError(
            f"expected val_size to leave records to train on; found {val_size} of {len(records)} records "
            f"with {len(sizes)} different prompts"
        )
    return train, [record for record in records if prompt_key(record.prompt) in held]
