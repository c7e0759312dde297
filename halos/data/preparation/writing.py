"""Records and examples as JSON lines in this project's format, which :mod:`halos.data.sources.json_source` reads."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

from halos.data.records.record import Completion, Record
from halos.data.views.examples import Example, Labelled, Pair, Scored
from halos.files import atomic_file

Row = dict[str, object]


def record_row(record: Record) -> Row:
    """Return a record as an object of this project's format."""
    prompt = record.prompt if isinstance(record.prompt, str) else [asdict(turn) for turn in record.prompt]
    completions = [{k: v for k, v in asdict(c).items() if v is not None} for c in record.completions]
    row: Row = {"id": record.id, "prompt": prompt, "completions": completions}
    return row | ({"preferences": [list(pair) for pair in record.preferences]} if record.preferences else {})


def example_row(example: Example) -> Row:
    """Return an example of a view as an object of this project's format."""
    if isinstance(example, Pair):
        sides = (Completion(example.chosen), Completion(example.rejected))
        return record_row(Record(example.id, example.prompt, sides, ((0, 1),)))
    label = example.desirable if isinstance(example, Labelled) else None
    score = example.score if isinstance(example, Scored) else None
    return record_row(Record(example.id, example.prompt, (Completion(example.completion, label, score),)))


def write_jsonl(file: Path, rows: Iterable[Mapping[str, object]]) -> int:
    """Write rows to a file, which appears complete or not at all.

    Args:
        file: the name; it ends in .jsonl or .jsonl.gz.
        rows: the objects, one for each line.

    Returns:
        The number of rows.

    Raises:
        ValueError: for another name.
    """
    if not file.name.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"convert: expected a file that ends in .jsonl or .jsonl.gz, found {file}")
    file.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    # Rows may come from a generator that fails at one of them: the file appears only once all are written.
    with atomic_file(file) as part:
        open_text = gzip.open if file.suffix == ".gz" else open
        with open_text(part, "wt", encoding="utf-8") as stream:
            for row in rows:
                # Without NaN and Infinity, which Python writes but JSON does not have: strict readers refuse them.
                stream.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
                count += 1
    return count
