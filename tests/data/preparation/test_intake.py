"""From a source to examples: leaks, strictness, and what is not for every view."""

import json
from pathlib import Path
from typing import Any

import pytest

from halos.data.preparation.intake import LEAKED, Intake, read, read_held
from halos.data.preparation.needs import DataNeeds
from halos.data.preparation.prepare import Preparation
from halos.data.preparation.writing import example_row, record_row, write_jsonl
from halos.data.rows.chat_tokens import Limits
from halos.data.sources.feedback_files import FeedbackFiles
from halos.data.sources.mixed import MixedSource
from halos.data.sources.oasst import OasstSource
from halos.data.sources.on_policy import OnPolicySource
from halos.data.views.examples import Labelled
from halos.data.views.selection import Selection
from tests import tiny


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def row(prompt: Any, text: str = "a", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": text, **more}


def data(train: str | list[str], val: str | None = None, **options: Any) -> Preparation:
    return Preparation(source=FeedbackFiles(train, val), **{"limits": Limits(512), **options})


def derived(preparation: Preparation, view: str) -> Intake:
    intake = preparation.read()
    preparation.derive(intake, DataNeeds(view=view))
    return intake


def test_leaks_are_left_out_of_validation_and_counted(tmp_path: Path) -> None:
    train = write(tmp_path / "t.jsonl", row("q one", label=1), row("q two", label=0))
    val = write(tmp_path / "v.jsonl", row("Q  one", label=1), row("q three", label=0))
    intake = derived(data(train, val), "binary")
    assert [e.id for e in intake.examples["val"].views[0]] == [f"{val}:2#0"]
    assert intake.reports["val"][LEAKED] == 1
    assert intake.report()["leaked_prompts"] == {"count": 1, "ids": [f"{val}:1"]}
    with pytest.raises(ValueError, match=r"data.strict: expected validation prompts .*found 1 \(.*v.jsonl:1\)"):
        data(train, val, strict=True).read()
    with pytest.raises(ValueError, match="expected a record whose prompt is not in the training data"):
        data(train, train).read()


def test_held_out_prompts_that_differ_in_case_alone_are_leaks(tmp_path: Path) -> None:
    rows = [row(f"{'q' if n % 2 else 'Q'} {n // 2}", label=n % 2) for n in range(40)]
    intake = derived(data(write(tmp_path / "t.jsonl", *rows), val_size=10), "binary")
    sides = [
        {e.prompt.lower() for e in intake.examples[split].views[0] if isinstance(e.prompt, str)}
        for split in ("train", "val")
    ]
    assert not sides[0] & sides[1]
    assert intake.reports["val"][LEAKED] > 0


def test_strict_names_what_would_be_left_out_but_not_what_a_setting_leaves_out(tmp_path: Path) -> None:
    train = write(tmp_path / "t.jsonl", row("q", label=1), *(row("q", " ", label=1) for _ in range(7)))
    with pytest.raises(ValueError, match=r"found empty completion \(7: (.*t.jsonl:\d, ){4}.*t.jsonl:6, …\)$"):
        data(train, strict=True).read()
    made = data(
        write(tmp_path / "u.jsonl", row("q", label=1), row("q", "world", label=0)),
        strict=True,
        selection=Selection(one_per_prompt=True),
    )
    assert len(derived(made, "binary").examples["train"]) == 1


def test_selection_is_for_training_alone(tmp_path: Path) -> None:
    train = write(tmp_path / "t.jsonl", *(row(f"q{n}", label=n % 2) for n in range(20)))
    val = write(tmp_path / "v.jsonl", *(row(f"v{n}", label=n % 2) for n in range(20)))
    intake = derived(data(train, val, selection=Selection(keep_desirable=0.1)), "binary")
    assert (len(intake.examples["train"]), len(intake.examples["val"])) == (11, 20)
    assert sum(example.desirable for example in intake.examples["train"].views[0] if isinstance(example, Labelled)) == 1


def test_all_assistant_turns_for_imitation_alone(tmp_path: Path) -> None:
    said = [("user", "hello"), ("assistant", "good"), ("user", "bad")]
    train = write(tmp_path / "t.jsonl", row([{"role": role, "content": text} for role, text in said], "world"))
    prepared = data(train, train_on="all").prepare(DataNeeds(view="demonstrations"), tiny.word_tokenizer(tiny.CHATML))
    first, last = prepared.rows["train"].table
    assert (first.id, last.id) == (f"{train}:1.1#0", f"{train}:1#0")
    tokenizer = tiny.word_tokenizer(tiny.CHATML)
    assert [str(tokenizer.decode(list(r.branches[0]))).split()[0] for r in (first, last)] == ["good", "world"]
    assert last.prompt[: len(first.prompt)] == first.prompt
    with pytest.raises(ValueError, match="train_on=all is for losses that imitate"):
        derived(data(train, train_on="all"), "binary")
    with pytest.raises(ValueError, match="train_on: expected last or all, found 'first'"):
        derived(data(train, train_on="first"), "demonstrations")


def test_all_turns_of_trees_are_records_already(tmp_path: Path) -> None:
    for source in (OasstSource("trees.jsonl"), MixedSource({"a": {"data": "oasst", "train": "trees.jsonl"}})):
        with pytest.raises(ValueError, match=rf"data\.train_on: expected last with data={source.name}, found all"):
            Preparation(source=source, limits=Limits(512), train_on="all")


def test_what_was_cut_is_told_by_file_and_lengths_in_tokens(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.jsonl", row("hello", "good " * n, label=1)) for name, n in (("a", 2), ("b", 9))]
    made = data(files, limits=Limits(14, 8)).prepare(DataNeeds(view="binary"), tiny.word_tokenizer(tiny.CHATML))
    report: Any = made.intake.report()
    train = report["splits"]["train"]
    assert [train["files"][file]["truncated"] for file in files] == [{}, {"completions truncated": 1}]
    rows = made.rows["train"].table
    assert train["lengths"]["completion (tokens)"]["p100"] == max(len(r.branches[0]) for r in rows)


MIXED = [
    {"prompt": [{"role": "system", "content": "é"}, {"role": "user", "content": "q"}], "chosen": "a", "rejected": "b"},
    {"prompt": "r", "completions": [{"text": "x", "desirable": True, "score": 0.5}, {"text": "y", "desirable": False}]},
]


@pytest.mark.parametrize("view", [None, "binary", "pairs", "scored", "demonstrations"])
def test_what_is_written_reads_back_as_the_same_examples(tmp_path: Path, view: str | None) -> None:
    made = data(write(tmp_path / "t.jsonl", *MIXED))
    if view is None:
        rows = [record_row(record) for record in made.read().records["train"]]
    else:
        rows = [example_row(example) for example in derived(made, view).examples["train"].views[0]]
    write_jsonl(tmp_path / "out.jsonl.gz", rows)

    def contents(preparation: Preparation) -> list[Any]:
        (examples,) = derived(preparation, view or "binary").examples["train"].views
        return [{k: v for k, v in example_row(e).items() if k != "id"} for e in examples]

    assert contents(data(str(tmp_path / "out.jsonl.gz"))) == contents(made)


def test_other_names_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"convert: expected a file that ends in .jsonl or .jsonl.gz, found"):
        write_jsonl(tmp_path / "a.csv", [])


@pytest.mark.parametrize("size", [True, 1.5, -1])
def test_held_out_records_are_a_whole_number(size: Any, tmp_path: Path) -> None:
    source = FeedbackFiles(write(tmp_path / "t.jsonl", row("q", label=1), row("r", label=0)))
    for held_out in (
        lambda: read(source, val_size=size, seed=0, strict=False),
        lambda: read_held(source, val_size=size, strict=False),
    ):
        with pytest.raises(ValueError, match=rf"^data.val_size: expected a whole number from 0 on, found {size}$"):
            held_out()
    with pytest.raises(ValueError, match=rf"^data.val_size: expected a whole number from 0 on, found {size}$"):
        OnPolicySource(feedback="f.jsonl", world=source, val_size=size)
