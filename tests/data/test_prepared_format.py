"""The format number of prepared data: tables of golden files change with it alone.

``python -m tests.data.test_prepared_format`` writes the digests of the present tables to ``golden/prepared.json``.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from halos.data.records.table import RecordTable
from halos.data.rows.chat_tokens import ChatTokens, Limits
from halos.data.rows.token_rows import TokenRows
from halos.data.rows.tokenise import make_rows
from halos.data.sources.feedback_files import FeedbackFiles
from halos.data.sources.file_source import FileSource
from halos.data.sources.hh import HHSource
from halos.data.sources.oasst import OasstSource
from halos.data.sources.shp import SHPSource
from halos.data.sources.ultrafeedback import UltraFeedbackSource
from halos.data.store.arrow import MEMORY, PREPARED_FORMAT
from halos.data.store.table import Table
from halos.data.views.derive import VIEWS
from halos.data.views.turns import expand_turns
from tests import tiny

GOLDEN = Path(__file__).parent / "golden"
DIGESTS = GOLDEN / "prepared.json"
RAISE = (
    "prepared data changed: raise the format number (PREPARED_FORMAT in halos/data/store/arrow.py), as users have "
    "prepared data of the old format, then run python -m tests.data.test_prepared_format"
)
SOURCES: dict[str, Callable[[], FileSource]] = {
    "files": lambda: FeedbackFiles("json.jsonl"),
    "csv": lambda: FeedbackFiles("table.csv"),
    "steps": lambda: FeedbackFiles("steps.jsonl"),
    "hh": lambda: HHSource("hh.jsonl"),
    "shp": lambda: SHPSource("shp.jsonl"),
    "oasst": lambda: OasstSource("oasst.jsonl"),
    "ultrafeedback": lambda: UltraFeedbackSource("ultrafeedback.jsonl"),
}


def digest_of(table: Table) -> str:
    """A digest of the contents of a table; how its rows are divided into batches does not count."""
    hasher = hashlib.sha256()
    for batch in table.batches[:1]:
        hasher.update(str([(field.name, str(field.type)) for field in batch.schema]).encode())
    rows = [row for batch in table.batches for row in batch.to_pylist()]
    hasher.update(repr([list(row.values()) for row in rows]).encode())
    hasher.update(json.dumps(table.notes, sort_keys=True).encode())
    return hasher.hexdigest()[:16]


def digest_of_view(records: RecordTable, view: str) -> str:
    """A digest of the places, values and numbers of a view's examples, of the examples, and of the report."""
    made = VIEWS[view](records)
    examples = made.examples
    arrays = [examples.chosen, examples.rejected, examples.values, examples.number]
    shown = [None if array is None else (array.dtype.str, array.tolist()) for array in arrays]
    return hashlib.sha256(repr((shown, list(examples), sorted(made.report.items()))).encode()).hexdigest()[:16]


def tables() -> Iterator[tuple[str, str]]:
    """(name, digest) of the tables that are prepared from each golden file."""
    tokens = ChatTokens(tiny.word_tokenizer(tiny.CHATML), Limits(4096))
    for name, make in SOURCES.items():
        records = make().train().records
        assert isinstance(records, RecordTable)
        yield f"{name}: records", digest_of(records.table)
        yield f"{name}: records of all turns", digest_of(expand_turns(records, MEMORY)[0].table)
        for view in VIEWS:
            try:
                examples = VIEWS[view](records).examples
            except ValueError:  # this format has nothing for the view
                continue
            yield f"{name}: {view}", digest_of_view(records, view)
            rows = make_rows(list(examples), tokens).table
            assert isinstance(rows, TokenRows)
            yield f"{name}: token rows of {view}", digest_of(rows.table)


def check(found: dict[str, str], stored: dict[str, Any], number: int) -> None:
    """Raise ``AssertionError`` unless the tables are those of their format number."""
    if stored["format"] != number:
        raise AssertionError(f"{DIGESTS} has format {stored['format']}: run python -m tests.data.test_prepared_format")
    changed = [name for name in sorted({*found, *stored["digests"]}) if found.get(name) != stored["digests"].get(name)]
    assert not changed, f"{RAISE}; changed: {', '.join(changed)}"


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.chdir(GOLDEN)  # the ids of records begin with the path as it was given
    return dict(tables())


def test_prepared_tables_change_with_the_format_number_alone(found: dict[str, str]) -> None:
    check(found, json.loads(DIGESTS.read_text(encoding="utf-8")), PREPARED_FORMAT)
    assert len(found) > 40


@pytest.mark.parametrize("change", ["another", "fewer"])
def test_a_change_without_a_new_number_says_what_to_do(change: str, found: dict[str, str]) -> None:
    changed = (
        found | {"json: pairs": "0"} if change == "another" else {k: v for k, v in found.items() if "pairs" not in k}
    )
    with pytest.raises(AssertionError, match="raise the format number"):
        check(changed, {"format": 1, "digests": found}, 1)
    with pytest.raises(AssertionError, match=r"run python -m tests\.data\.test_prepared_format"):
        check(changed, {"format": 1, "digests": found}, 2)


def test_a_digest_covers_every_cell_and_type() -> None:
    def table(kind: pa.DataType, *values: Any) -> Table:
        return Table([pa.record_batch([pa.array(values, kind)], names=["n"])])

    one = digest_of(table(pa.int64(), 1, 2))
    assert one == digest_of(Table([*table(pa.int64(), 1).batches, *table(pa.int64(), 2).batches]))
    assert len({one, digest_of(table(pa.int64(), 1, 3)), digest_of(table(pa.int32(), 1, 2))}) == 3


if __name__ == "__main__":
    import os

    os.chdir(GOLDEN)
    content = {"format": PREPARED_FORMAT, "digests": dict(tables())}
    DIGESTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
