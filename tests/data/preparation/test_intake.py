"""From a source to examples: leaks, strictness, and what is not for every view."""

import json
from pathlib import Path
from typing import Any

import pytest

from halos.data.module import PreferenceDataModule
from halos.data.preparation.intake import LEAKED, Intake
from halos.data.preparation.prepare import DataNeeds, count_labels
from halos.data.preparation.writing import example_row, record_row, write_jsonl
from halos.data.sources.json_source import JsonSource
from halos.data.sources.mixed import MixedSource
from halos.data.sources.oasst import OasstSource
from halos.data.views.selection import Selection
from tests import tiny


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def row(prompt: Any, text: str = "a", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": text, **more}


def derived(module: PreferenceDataModule, view: str) -> Intake:
    """The examples of a view, and the report, of a data module's records."""
    intake = module.preparation.read()
    module.preparation.derive(intake, view)
    return intake


def data(train: str, val: str | None = None, **options: Any) -> PreferenceDataModule:
    return PreferenceDataModule(JsonSource(train, val), **options)


def test_leaks_are_left_out_of_validation_and_counted(tmp_path: Path) -> None:
    train = write(tmp_path / "t.jsonl", row("q one", label=1), row("q two", label=0))
    val = write(tmp_path / "v.jsonl", row("Q  one", label=1), row("q three", label=0))
    made = data(train, val)
    intake = derived(made, "binary")
    assert [e.id for e in intake.examples["val"]] == [f"{val}:2#0"]
    assert intake.reports["val"][LEAKED] == 1
    assert intake.report()["leaked_prompts"] == {"count": 1, "ids": [f"{val}:1"]}
    with pytest.raises(ValueError, match=r"data.strict: expected validation prompts .*found 1 \(.*v.jsonl:1\)"):
        derived(data(train, val, strict=True), "binary")
    with pytest.raises(ValueError, match="expected a validation record whose prompt is not in the training data"):
        derived(data(train, train), "binary")


def test_held_out_prompts_that_differ_in_case_alone_are_leaks(tmp_path: Path) -> None:
    rows = [row(f"{'q' if n % 2 else 'Q'} {n // 2}", label=n % 2) for n in range(40)]
    made = data(write(tmp_path / "t.jsonl", *rows), val_size=10)
    intake = derived(made, "binary")
    sides = [
        {e.prompt.lower() for e in intake.examples[split] if isinstance(e.prompt, str)} for split in ("train", "val")
    ]
    assert not sides[0] & sides[1]
    assert intake.reports["val"][LEAKED] > 0


def test_strict_names_what_would_be_left_out_but_not_what_a_setting_leaves_out(tmp_path: Path) -> None:
    train = write(tmp_path / "t.jsonl", row("q", label=1), *(row("q", " ", label=1) for _ in range(7)))
    with pytest.raises(ValueError, match=r"found empty completion \(7: (.*t.jsonl:\d, ){4}.*t.jsonl:6, …\)$"):
        derived(data(train, strict=True), "binary")
    made = data(
        write(tmp_path / "u.jsonl", row("q", label=1), row("q", label=0)),
        strict=True,
        select=Selection(one_per_prompt=True),
    )
    intake = derived(made, "binary")
    assert len(intake.examples["train"]) == 1


def test_selection_is_for_training_alone(tmp_path: Path) -> None:
    train = write(tmp_path / "t.jsonl", *(row(f"q{n}", label=n % 2) for n in range(20)))
    val = write(tmp_path / "v.jsonl", *(row(f"v{n}", label=n % 2) for n in range(20)))
    made = data(train, val, select=Selection(keep_desirable=0.1))
    intake = derived(made, "binary")
    assert (len(intake.examples["train"]), len(intake.examples["val"])) == (11, 20)
    assert count_labels(intake.examples["train"]) == (1, 10)


def test_all_assistant_turns_for_imitation_alone(tmp_path: Path) -> None:
    said = [("user", "hello"), ("assistant", "good"), ("user", "bad")]
    train = write(tmp_path / "t.jsonl", row([{"role": role, "content": text} for role, text in said], "world"))
    made = data(train, train_on="all")
    made.prepare(DataNeeds(view="demonstrations"), tiny.word_tokenizer(tiny.CHATML))
    first, last = made.rows["train"].rows
    assert (first.id, last.id) == (f"{train}:1.1#0", f"{train}:1#0")
    tokenizer = tiny.word_tokenizer(tiny.CHATML)
    assert [tokenizer.decode(r.branches[0]).split()[0] for r in (first, last)] == ["good", "world"]
    assert last.prompt[: len(first.prompt)] == first.prompt
    with pytest.raises(ValueError, match="train_on=all is for losses that imitate"):
        derived(data(train, train_on="all"), "binary")
    with pytest.raises(ValueError, match="train_on: expected last or all, found 'first'"):
        derived(data(train, train_on="first"), "demonstrations")


def test_all_turns_of_trees_are_records_already(tmp_path: Path) -> None:
    for source in (OasstSource("trees.jsonl"), MixedSource({"a": {"data": "oasst", "train": "trees.jsonl"}})):
        with pytest.raises(ValueError, match=rf"data\.train_on: expected last with data={source.name}, found all"):
            PreferenceDataModule(source, train_on="all")


def test_what_was_cut_is_told_by_file_and_lengths_in_tokens(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.jsonl", row("hello", "good " * n, label=1)) for name, n in (("a", 2), ("b", 9))]
    made = PreferenceDataModule(JsonSource(files), max_length=14, max_prompt_length=8)
    made.prepare(DataNeeds(view="binary"), tiny.word_tokenizer(tiny.CHATML))
    train = made.intake.report()["splits"]["train"]
    assert [train["files"][file]["truncated"] for file in files] == [{}, {"completions truncated": 1}]
    rows = made.rows["train"].rows
    assert train["lengths"]["completion (tokens)"]["p100"] == max(len(r.branches[0]) for r in rows)


def test_stratified_steps_need_labels(tmp_path: Path) -> None:
    train = write(tmp_path / "t.jsonl", row("hello"), row("world"))
    made = data(train, stratified=True)
    made.prepare(DataNeeds(view="demonstrations"), tiny.word_tokenizer(tiny.CHATML))
    with pytest.raises(ValueError, match="expected a loss that learns from labels"):
        made.plan(epochs=1, max_steps=-1, accumulate=1, world_size=1)


MIXED = [
    {"prompt": [{"role": "system", "content": "é"}, {"role": "user", "content": "q"}], "chosen": "a", "rejected": "b"},
    {"prompt": "r", "completions": [{"text": "x", "desirable": True, "score": 0.5}, {"text": "y", "desirable": False}]},
]


@pytest.mark.parametrize("view", [None, "binary", "pairs", "scored", "demonstrations"])
def test_what_is_written_reads_back_as_the_same_examples(tmp_path: Path, view: str | None) -> None:
    made = data(write(tmp_path / "t.jsonl", *MIXED))
    rows = [record_row(record) for record in made.preparation.read().records["train"]]
    if view is not None:
        rows = [example_row(example) for example in derived(made, view).examples["train"]]
    write_jsonl(tmp_path / "out.jsonl.gz", rows)
    again = data(str(tmp_path / "out.jsonl.gz"))
    made = data(write(tmp_path / "t.jsonl", *MIXED))

    def said(module: PreferenceDataModule) -> list[Any]:
        return [
            {k: v for k, v in example_row(e).items() if k != "id"}
            for e in derived(module, view or "binary").examples["train"]
        ]

    assert said(again) == said(made)


def test_other_names_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"convert: expected a file that ends in .jsonl or .jsonl.gz, found"):
        write_jsonl(tmp_path / "a.csv", [])
