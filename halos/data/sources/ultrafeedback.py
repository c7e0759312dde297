"""UltraFeedback: raw, with four scored completions of each instruction, or binarized, with the best and another one."""

from __future__ import annotations

from collections import Counter
from typing import final

from halos.data.layouts.layouts import Layouts
from halos.data.layouts.roles import Declaration
from halos.data.reading.fields import RawRow, has, keys_of, prompt_of, required, score_of, text_of, wrong
from halos.data.records.adapted import without_empty
from halos.data.records.record import Completion, Record
from halos.data.sources.file_source import Columns, Files, RowSource

SCORES = ("overall_score", "fine-grained_score")


def _completion(where: str, name: str, item: object, score: str) -> Completion:
    if not isinstance(item, dict) or not has(item, "response"):
        raise wrong(where, name, "an object with 'response'", item)
    if score not in item:
        raise ValueError(f"{where}: expected {name!r} to have {score!r} (data.source.score); found {keys_of(item)}")
    text = text_of(where, f"{name}.response", item["response"])
    return Completion(text, score=score_of(where, f"{name}.{score}", item[score]))


@final
class UltraFeedbackSource(RowSource):
    """Scored completions in the format of ``openbmb/UltraFeedback``, or binarized ones (``HuggingFaceH4``'s).

    Args:
        train: files of training data.
        val: files of validation data.
        columns: renames keys, see :class:`.FileSource`.
        score: the field of a raw completion that is its score: ``overall_score`` or ``fine-grained_score`` (the mean
            over helpfulness, honesty, instruction following and truthfulness).
        bad_rows, max_bad_rows: see :class:`.FileSource`.
    """

    name = "ultrafeedback"

    def __init__(
        self,
        train: Files | None = "openbmb/UltraFeedback:train",
        val: Files | None = None,
        columns: Columns = None,
        score: str = "overall_score",
        bad_rows: str = "stop",
        max_bad_rows: int = 100,
    ) -> None:
        super().__init__(train, val, columns, bad_rows, max_bad_rows)
        if score not in SCORES:
            raise ValueError(f"data.source.score: expected {' or '.join(SCORES)}, found {score!r}")
        self._score, self._binarized = score, Layouts(Declaration())

    def record(self, where: str, row: RawRow, dropped: Counter[str]) -> Record | None:
        """Adapt a raw row, whose completions have scores, or a binarized row (a scored pair)."""
        if not has(row, "instruction"):
            return self._binarized.record(where, row, dropped)
        items = required(where, row, "completions")
        if not isinstance(items, list):
            raise wrong(where, "completions", "a list of objects with 'response'", items)
        if not items:
            dropped["instruction without completions"] += 1
            return None
        completions = tuple(_completion(where, f"completions[{n}]", item, self._score) for n, item in enumerate(items))
        return without_empty(Record(where, prompt_of(where, row, "instruction"), completions), dropped)
