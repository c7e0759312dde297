"""Proposals: a mapping that reads the file as it stands, with the guesses named."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from halos.data.layouts.propose import as_yaml, propose
from halos.data.layouts.roles import Declaration
from halos.data.records.record import Completion, Record
from halos.data.sources.feedback_files import FeedbackFiles

Q, A = "What is two and two?", "Four."


def proposed(tmp_path: Path, *rows: dict[str, Any]) -> tuple[list[Record], str]:
    """Read rows with nothing but what is proposed for them."""
    file = tmp_path / "f.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    text = as_yaml(propose(rows, Declaration()), str(file))
    node = yaml.safe_load(text)
    assert node.pop("defaults") == ["files", "_self_"]
    return list(FeedbackFiles(**node).train().records), text


@pytest.mark.parametrize(
    ("row", "expected", "remark"),
    [
        ({"prompt": Q, "completion": A, "label": True}, (Q, Completion(A, True)), ""),
        ({"topic": Q, "essay": A, "verdict": "up"}, (Q, Completion(A, True)), "the label is 'verdict'"),
        ({"frage": Q, "antwort": A, "note": 2.5}, (Q, Completion(A, score=2.5)), "the score is 'note'"),
        ({"prompt": Q, "context": "Docs.", "completion": A}, (f"{Q}\nDocs.", Completion(A)), "'context' is put below"),
        ({"prompt": Q, "images": ["a"], "completion": A}, (Q, Completion(A)), "'images' is left out"),
        ({"prompt": Q, "response": A, "helpfulness": 4, "verbosity": 1}, (Q, Completion(A, score=4.0)), "the score is"),
    ],
)
def test_a_proposal_reads_the_row(
    row: dict[str, Any], expected: tuple[str, Completion], remark: str, tmp_path: Path
) -> None:
    (record,), text = proposed(tmp_path, row)
    assert (record.prompt, record.completions) == (expected[0], (expected[1],))
    assert remark in text.partition("defaults")[0]


def test_unknown_words_of_a_label_are_proposed(tmp_path: Path) -> None:
    rows = [{"prompt": f"{Q} {n}", "completion": A, "label": word} for n, word in enumerate(("prima", "mies", "prima"))]
    records, text = proposed(tmp_path, *rows)
    assert [record.completions[0].desirable for record in records] == [True, False, True]
    assert "swap them where it is wrong" in text


def test_nothing_is_proposed_without_texts() -> None:
    with pytest.raises(ValueError, match="propose: expected two columns of text, found 'a'"):
        propose([{"a": "x", "b": 3}], Declaration())
