"""Written records and examples are read back as they were."""

import json
from collections import Counter
from pathlib import Path

import pytest

from halos.data.layouts.layouts import to_record
from halos.data.preparation.writing import example_row, record_row, write_jsonl
from halos.data.records.record import Record
from halos.data.sources.feedback_files import FeedbackFiles
from halos.data.views.derive import VIEWS
from tests.data.records.test_table import RECORDS


def test_records_are_read_back(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "r.jsonl", map(record_row, RECORDS))
    assert list(FeedbackFiles(tmp_path / "r.jsonl").train().records) == RECORDS
    assert list(FeedbackFiles(tmp_path / "r.jsonl").stream({})) == RECORDS


@pytest.mark.parametrize("view", VIEWS)
def test_examples_are_read_back(view: str) -> None:
    examples = list(VIEWS[view](RECORDS).examples)
    records = [to_record("f:1", json.loads(json.dumps(example_row(example))), Counter()) for example in examples]
    again = VIEWS[view]([record for record in records if isinstance(record, Record)]).examples
    contents = [[repr(example).partition("#")[2].partition(",")[2] for example in some] for some in (examples, again)]
    assert contents[0] == contents[1]
    assert len(examples) > (view != "pairs")
