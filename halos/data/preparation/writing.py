"""Records and examples → JSON lines in this project's format, which :mod:`halos.data.sources.formats` reads back."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from halos.data.records.record import Prompt, Record
from halos.data.rows.token_rows import Example
from halos.data.views.examples import Demonstration, Labelled, Pair
from halos.files import atomic_file


def record_row(record: Record) -> dict[str, Any]:
    """A record as an object of the record format."""
    completions = []
    for completion in record.completions:
        item: dict[str, Any] = {"text": completion.text}
        if completion.desirable is not None:
            item["desirable"] = completion.desirable
        if completion.score is not None:
            item["score"] = completion.score
        completions.append(item)
    row = {"id": record.id, "prompt": _prompt(record.prompt), "completions": completions}
    return row | ({"preferences": [list(pair) for pair in record.preferences]} if record.preferences else {})


def example_row(example: Example) -> dict[str, Any]:
    """An example of a view as an object of the record format."""
    row: dict[str, Any] = {"id": example.id, "prompt": _prompt(example.prompt)}
    if isinstance(example, Pair):
        return row | {"completions": [{"text": example.chosen}, {"text": example.rejected}], "preferences": [[0, 1]]}
    item: dict[str, Any] = {"text": example.completion}
    if isinstance(example, Labelled):
        item["desirable"] = example.desirable
    elif not isinstance(example, Demonstration):
        item["score"] = example.score
    return row | {"completions": [item]}


def _prompt(prompt: Prompt) -> Any:
    return prompt if isinstance(prompt, str) else [{"role": turn.role, "content": turn.content} for turn in prompt]


def write_jsonl(file: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows whole or not at all; how many they were.

    Raises ``ValueError`` for a name that is not .jsonl or .jsonl.gz.
    """
    if not file.name.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"convert: expected a file that ends in .jsonl or .jsonl.gz, found {file}")
    file.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with atomic_file(file) as part:
        open_text = gzip.open if file.suffix == ".gz" else open
        with open_text(part, "wt", encoding="utf-8") as out:
            for row in rows:
                count += out.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n") > 0
    return count
