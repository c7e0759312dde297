"""Record for record, what each public data set's schema becomes; rows made up by us in that schema."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from halos.data.records.adapted import FileCounts
from halos.data.records.record import Completion, Message, Record
from halos.data.sources.feedback_files import FeedbackFiles
from halos.data.sources.file_source import FileSource
from halos.data.sources.hh import HHSource
from halos.data.sources.oasst import OasstSource
from halos.data.sources.shp import SHPSource
from halos.data.sources.ultrafeedback import UltraFeedbackSource


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def turns(*said: str) -> tuple[Message, ...]:
    return tuple(Message(role, text) for role, text in (one.split(": ", 1) for one in said))


def read(source: FileSource) -> tuple[list[Record], Counter[str]]:
    found = source.train()
    return list(found.records), found.dropped


def test_hh(tmp_path: Path) -> None:
    start = "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:"
    file = write(tmp_path / "helpful-base.jsonl", [{"chosen": f"{start} yes", "rejected": f"{start} no"}])
    assert read(HHSource(str(file))) == (
        [
            Record(
                f"{file}:1",
                turns("user: q", "assistant: a", "user: r"),
                (Completion("yes"), Completion("no")),
                ((0, 1),),
            )
        ],
        Counter(),
    )


def shp(n: int, label: int, ratio: float) -> dict[str, Any]:
    return {
        "post_id": f"p{n}", "domain": "askculinary_train", "upvote_ratio": 0.98, "history": f"question {n}",
        "c_root_id_A": "x", "c_root_id_B": "y", "created_at_utc_A": 1, "created_at_utc_B": 2, "score_A": 8,
        "score_B": 4, "human_ref_A": "a", "human_ref_B": "b", "labels": label,
        "seconds_difference": 3.0, "score_ratio": ratio,
    }  # fmt: skip


def test_shp(tmp_path: Path) -> None:
    file = write(tmp_path / "shp.json.jsonl", [shp(0, 1, 2.0), shp(1, 0, 7.5), shp(2, 1, 1.9)])
    both = (Completion("a", score=8.0), Completion("b", score=4.0))
    kept = [
        Record(f"{file}:1", "question 0", both, ((0, 1),)),
        Record(f"{file}:2", "question 1", both, ((1, 0),)),
    ]
    assert read(SHPSource(str(file))) == (kept, Counter({"filtered: pairs with a score ratio below 2": 1}))
    everything = [*kept, Record(f"{file}:3", "question 2", both, ((0, 1),))]
    assert read(SHPSource(str(file), min_ratio=1)) == (everything, Counter())
    with pytest.raises(ValueError, match=r"min_ratio: expected a number from 1 on, found 0\.5"):
        SHPSource(str(file), min_ratio=0.5)
    with pytest.raises(ValueError, match="min_ratio: expected a number from 1 on, found True"):
        SHPSource(str(file), min_ratio=True)
    wrong = write(tmp_path / "wrong.jsonl", [shp(0, 1, 3.0) | {"labels": 2}])
    with pytest.raises(ValueError, match=r"wrong.jsonl:1: expected 'labels' to be 1 .*; found 2"):
        SHPSource(str(wrong)).train()


def message(name: str, parent: str | None, role: str, **more: Any) -> dict[str, Any]:
    return {
        "message_id": name, "parent_id": parent, "user_id": "u", "created_date": "2023-02-05", "text": f"text {name}",
        "role": role, "lang": "en", "review_count": 3, "review_result": True, "deleted": False, "rank": None,
        "synthetic": False, "message_tree_id": "t", "tree_state": "ready_for_export", "labels": None,
    } | more  # fmt: skip


TREE = [
    message("root", None, "prompter"),
    message("b", "root", "assistant", rank=1),
    message("a", "root", "assistant", rank=0),
    message("c", "root", "assistant", rank=2, deleted=True),
    message("d", "root", "assistant"),
    message("next", "a", "prompter"),
    message("only", "next", "assistant"),
    message("leaf", "b", "prompter"),
]


def nested(name: str) -> dict[str, Any]:
    node = next(row for row in TREE if row["message_id"] == name)
    return node | {"replies": [nested(row["message_id"]) for row in TREE if row["parent_id"] == name]}


EXPECTED = [
    (("user: text root",), ("text b", "text a", "text d"), ((1, 0),)),
    (("user: text root", "assistant: text a", "user: text next"), ("text only",), ()),
]


def content(records: list[Record]) -> list[Any]:
    return [
        (
            tuple(f"{m.role}: {m.content}" for m in record.prompt if isinstance(m, Message)),
            tuple(c.text for c in record.completions),
            record.preferences,
        )
        for record in records
    ]


def test_oasst_messages(tmp_path: Path) -> None:
    german = [message("de", None, "prompter", lang="de"), message("ja", "de", "assistant", lang="de")]
    lost = [message("lost", "nowhere", "assistant")]
    file = write(tmp_path / "oasst.jsonl", [*TREE[::-1], *german, *lost])  # in any order: children before parents
    records, dropped = read(OasstSource(str(file)))
    mirrored = [(EXPECTED[0][0], ("text d", "text a", "text b"), ((1, 2),)), EXPECTED[1]]
    assert sorted(content(records)) == sorted(mirrored)
    assert [record.id for record in records] == [f"{file}:8", f"{file}:3"]
    assert dropped == {
        "deleted message": 1,
        "prompt without a reply": 1,
        "message whose parent is missing": 1,
        "filtered: trees in another language than en": 1,
    }
    assert len(read(OasstSource(str(file), lang=None))[0]) == 3


def test_oasst_trees(tmp_path: Path) -> None:
    tree = {"message_tree_id": "t", "tree_state": "ready_for_export", "prompt": nested("root")}
    file = tmp_path / "trees.jsonl.gz"
    file.write_bytes(gzip.compress(json.dumps(tree).encode()))
    records, dropped = read(OasstSource(str(file)))
    assert content(records) == EXPECTED[:1] + EXPECTED[1:]
    assert records[0].id == f"{file}:1/prompt"
    assert len({record.id for record in records}) == 2
    assert dropped == {"deleted message": 1, "prompt without a reply": 1}
    origins: dict[str, FileCounts] = {}
    assert list(OasstSource(str(file)).stream(origins)) == records
    assert origins[str(file)].dropped == dropped


def test_oasst_messages_are_no_stream(tmp_path: Path) -> None:
    file = write(tmp_path / "oasst.jsonl", TREE)
    with pytest.raises(ValueError, match=rf"{file}:1: expected one tree a row .* found one message a row"):
        list(OasstSource(str(file)).stream({}))


def test_a_tree_that_loops_is_counted_not_followed(tmp_path: Path) -> None:
    loop = [message("x", "y", "prompter"), message("y", "x", "assistant")]
    file = write(tmp_path / "a.jsonl", [*TREE, *loop])
    assert read(OasstSource(str(file)))[1]["message whose parent is missing"] == 2


def test_ultrafeedback_raw(tmp_path: Path) -> None:
    completions = [
        {"annotations": {}, "critique": "c", "custom_system_prompt": "s", "fine-grained_score": 4.25 - n, "model": "m",
         "overall_score": float(n), "principle": "honesty", "response": f"reply {n}"}
        for n in range(4)
    ]  # fmt: skip
    row = {"source": "sharegpt", "instruction": "do", "models": [], "completions": completions}
    file = write(tmp_path / "uf.jsonl", [row, row | {"completions": []}])
    replies = tuple(Completion(f"reply {n}", score=float(n)) for n in range(4))
    dropped = Counter({"instruction without completions": 1})
    assert read(UltraFeedbackSource(str(file))) == ([Record(f"{file}:1", "do", replies)], dropped)
    (record,), _ = read(UltraFeedbackSource(str(file), score="fine-grained_score"))
    assert [c.score for c in record.completions] == [4.25, 3.25, 2.25, 1.25]
    with pytest.raises(ValueError, match="score: expected overall_score or fine-grained_score, found 'best'"):
        UltraFeedbackSource(str(file), score="best")


@pytest.mark.parametrize("source", [UltraFeedbackSource, FeedbackFiles])
def test_ultrafeedback_binarized(tmp_path: Path, source: type[FileSource]) -> None:
    asked = {"role": "user", "content": "do"}
    row = {
        "prompt": "do", "prompt_id": "h", "score_chosen": 8.5, "score_rejected": 2.0,
        "chosen": [asked, {"role": "assistant", "content": "good"}],
        "rejected": [asked, {"role": "assistant", "content": "bad"}],
        "messages": [asked, {"role": "assistant", "content": "good"}],
    }  # fmt: skip
    file = write(tmp_path / "uf.jsonl", [row])
    both = (Completion("good", score=8.5), Completion("bad", score=2.0))
    assert read(source(str(file))) == ([Record(f"{file}:1", turns("user: do"), both, ((0, 1),))], Counter())


def test_conversations_with_system_and_tool_turns(tmp_path: Path) -> None:
    said = [("system", "s"), ("user", "q"), ("assistant", "look up"), ("tool", "42"), ("assistant", "It is 42.")]
    messages = [{"role": role, "content": text} for role, text in said]
    file = write(tmp_path / "a.jsonl", [{"messages": messages, "label": True}])
    prompt = turns("system: s", "user: q", "assistant: look up", "tool: 42")
    assert read(FeedbackFiles(str(file))) == (
        [Record(f"{file}:1", prompt, (Completion("It is 42.", True),))],
        Counter(),
    )


def test_columns_of_other_names(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"question": "q", "better": "a", "worse": "b"}])
    columns = {"prompt": "question", "chosen": "better", "rejected": "worse", "label": None}
    both = (Completion("a"), Completion("b"))
    assert read(FeedbackFiles(str(file), columns=columns)) == ([Record(f"{file}:1", "q", both, ((0, 1),))], Counter())


def test_what_each_file_gave(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "completion": text} for text in ("a", "", " ")]
    files = [str(write(tmp_path / name, rows)) for name in ("b.jsonl", "a.jsonl")]
    found = FeedbackFiles(str(tmp_path / "*.jsonl")).train()
    assert list(found.origins) == sorted(files)
    for file, origin in found.origins.items():
        assert (origin.rows, origin.records, origin.dropped) == (3, 1, {"empty completion": 2})
        assert origin.places == {"empty completion": [f"{file}:2", f"{file}:3"]}
