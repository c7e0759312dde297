"""Refuses data of which the tokenizer, such as the toy model's, does not know the words."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_UNKNOWN = 0.1
"""The largest share of unknown tokens in a data set."""


def unknown_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id that stands for text beyond the vocabulary; None if there is none, or if it also ends texts."""
    unknown: int | None = tokenizer.unk_token_id
    return None if unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id) else unknown


def count_unknown(columns: list[pa.ListArray], unknown: int | None) -> tuple[int, int]:
    """Return how many token ids in some columns are unknown, and how many there are."""
    ids = [column.flatten().to_numpy() for column in columns]
    unknown_count = 0 if unknown is None else sum(int(np.count_nonzero(of_column == unknown)) for of_column in ids)
    return unknown_count, sum(map(len, ids))


def check_known(counts: list[tuple[int, int]], tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Raise ``ValueError`` if too many tokens are unknown.

    Args:
        counts: what :func:`count_unknown` returned for each part of the data.
        tokenizer: the tokenizer.
        where: the first example, for the error.
    """
    unknown, tokens = (sum(numbers) for numbers in zip(*counts, strict=True)) if counts else (0, 0)
    if unknown > MOST_UNKNOWN * tokens:
        raise ValueError(
            f"{where}: expected a tokenizer that knows the words of the data, found {unknown / tokens:.0%} unknown "
            f"tokens ({tokenizer.unk_token}) in them; the default model knows the words of data=toy alone, name "
            "another with model.path=…"
        )
