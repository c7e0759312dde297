"""Stanford Human Preferences: two comments under a post, of which readers scored one higher than the other."""

from __future__ import annotations

from collections import Counter
from typing import final

from halos.checks import check_number
from halos.data.reading.fields import RawRow, preference_of, prompt_of, required, score_of, text_of
from halos.data.records.adapted import FILTERED, without_empty
from halos.data.records.record import Completion, Record
from halos.data.sources.file_source import Columns, Files, RowSource


@final
class SHPSource(RowSource):
    """Pairs of scored comments in the format of ``stanfordnlp/SHP``.

    Args:
        train: files of training data.
        val: files of validation data.
        columns: renames keys, see :class:`.FileSource`.
        min_ratio: pairs with a lower ratio of the higher score to the lower one are left out; 1 keeps every pair.
        bad_rows, max_bad_rows: see :class:`.FileSource`.
    """

    name = "shp"

    def __init__(
        self,
        train: Files | None = "stanfordnlp/SHP:train",
        val: Files | None = None,
        columns: Columns = None,
        min_ratio: float = 2.0,
        bad_rows: str = "stop",
        max_bad_rows: int = 100,
    ) -> None:
        super().__init__(train, val, columns, bad_rows, max_bad_rows)
        check_number("data.source.min_ratio", min_ratio, 1)
        self._min_ratio = min_ratio

    def record(self, where: str, row: RawRow, dropped: Counter[str]) -> Record | None:
        """Adapt a pair with both scores; ``labels`` is 1 where A is preferred, 0 where B is.

        Pairs whose ``score_ratio`` (the higher score over the lower one) is below the minimum are left out.
        """
        preferences = preference_of(where, row, "labels", "human_ref_A", "human_ref_B")
        ratio = score_of(where, "score_ratio", required(where, row, "score_ratio"))
        a, b = (
            Completion(text_of(where, ref, required(where, row, ref)), score=score_of(where, score, row.get(score)))
            for ref, score in (("human_ref_A", "score_A"), ("human_ref_B", "score_B"))
        )
        record = Record(where, prompt_of(where, row, "history"), (a, b), preferences)
        if ratio is not None and ratio < self._min_ratio:
            dropped[f"{FILTERED}pairs with a score ratio below {self._min_ratio:g}"] += 1
            return None
        return without_empty(record, dropped)
