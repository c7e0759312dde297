"""The data module of a stream: validation beforehand, training as it comes, and what is refused."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from halos.data.preparation.needs import DataNeeds, RowNeeds
from halos.data.sources.feedback_files import FeedbackFiles
from halos.data.streaming.module import StreamingDataModule
from halos.data.views.selection import Selection
from tests import tiny


def write(file: Path, *, start: int = 0, count: int = 30) -> str:
    rows = [
        {"prompt": f"hello {'world ' * (n % 10)}{n}", "completion": "good " * (1 + n % 3), "label": n % 2}
        for n in range(start, start + count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def module(train: str, val: str | None = None, *, view: str = "binary", **options: Any) -> StreamingDataModule:
    made = StreamingDataModule(FeedbackFiles(train, val), **{"max_length": 100, "batch_size": 4, **options})
    made.prepare(DataNeeds(view=view, flags=RowNeeds(mismatched=view == "binary")), tiny.bpe_tokenizer(tiny.CHATML))
    return made


def attach(made: StreamingDataModule, *, accumulate: int = 1, world_size: int = 1, rank: int = 0) -> Any:
    made.trainer = SimpleNamespace(  # type: ignore[assignment]
        accumulate_grad_batches=accumulate, world_size=world_size, global_rank=rank, global_step=0
    )
    return made.train_dataloader()


def ids(loader: Any) -> list[str]:
    return [name for batch in loader for name in batch.ids]


def planned(made: StreamingDataModule, steps: int = 10) -> StreamingDataModule:
    made.plan(epochs=1, max_steps=steps, accumulate=1, world_size=1)
    return made


def test_validation_has_files_of_its_own_and_training_leaves_their_prompts_out(tmp_path: Path) -> None:
    made = planned(module(write(tmp_path / "t.jsonl"), write(tmp_path / "v.jsonl", start=20, count=15)))
    assert [row.id for row in made.rows["val"].table] == [f"{tmp_path}/v.jsonl:{n}#0" for n in range(1, 16)]
    loader = attach(made)
    assert set(ids(loader)) == {f"{tmp_path}/t.jsonl:{n}#0" for n in range(1, 21)}
    assert made.take_account()
    counts = made.prepared.intake.report()["splits"]["train"]["counts"]  # type: ignore[index]
    assert counts["training records whose prompt is in the validation data left out"] == 10
    assert counts["records"] == counts["examples"] == 20
    assert counts["passes"] == 3  # of 20 examples each, 40 read and one that waits for its mismatched one


def test_the_first_records_are_held_out(tmp_path: Path) -> None:
    file = write(tmp_path / "t.jsonl")
    made = planned(module(file, val_size=5))
    assert [row.id for row in made.rows["val"].table] == [f"{file}:{n}#0" for n in range(1, 6)]
    assert set(ids(attach(made))) == {f"{file}:{n}#0" for n in range(6, 31)}
    with pytest.raises(ValueError, match=r"data.val_size: expected at most 30, the records of the stream; found 31"):
        module(file, val_size=31)


def test_without_validation_prompts_to_sample_are_the_streams_first(tmp_path: Path) -> None:
    made = module(write(tmp_path / "t.jsonl"))
    assert len(set(made.prepared.prompts)) == len(made.prepared.prompts) > 16
    assert made.prepared.prompts[0].startswith("hello")
    assert set(made.rows) == set()
    assert made.prepared.example().id == f"{tmp_path}/t.jsonl:1#0"
    assert len(made.prepared.example().branches) == 2


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("served", [0, 3, 10])
def test_a_loader_goes_on_behind_what_was_served(tmp_path: Path, served: int, workers: int) -> None:
    made = planned(module(write(tmp_path / "t.jsonl"), shuffle_buffer=8, workers=workers))
    whole = [batch.ids for batch in attach(made)]
    first = attach(made)
    for _ in zip(range(served), first, strict=False):
        pass
    state, account = first.state_dict(), made.state_dict()
    second = attach(made)
    made.load_state_dict(account)
    second.load_state_dict(state)
    assert [batch.ids for batch in second] == whole[served:]
    tokens = made.tokens_in(10)
    made._before.clear()
    everything = attach(made)
    assert tokens == sum(batch.total_tokens for batch in everything) == made.tokens_in(10)


def test_two_ranks_see_what_one_does(tmp_path: Path) -> None:
    made = planned(module(write(tmp_path / "t.jsonl"), shuffle_buffer=8))
    whole = [set(batch.ids) for batch in attach(made)]
    half = planned(module(write(tmp_path / "t.jsonl"), shuffle_buffer=8, batch_size=2))
    parts = [[set(batch.ids) for batch in attach(half, world_size=2, rank=rank)] for rank in range(2)]
    assert [one | other for one, other in zip(*parts, strict=True)] == whole


def test_a_key_covers_files_and_settings(tmp_path: Path) -> None:
    file = write(tmp_path / "t.jsonl")
    key = module(file).prepared.keys()["train"]
    assert key == module(file).prepared.keys()["train"]
    others = [
        module(file, shuffle_buffer=9), module(file, seed=1), module(file, max_length=99), module(file, val_size=2),
        module(file, keep_together=1), module(file, view="demonstrations"),
        module(file, select=Selection(keep_desirable=0.5)), module(write(tmp_path / "t.jsonl", count=31)),
    ]  # fmt: skip
    assert key not in {other.prepared.keys()["train"] for other in others}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_examples": 5}, r"data.max_examples: expected null with data.streaming=true, found 5"),
        ({"stratified": True}, r"data.stratified: expected false with data.streaming=true, found True"),
        ({"workers": 2}, r"data.workers: expected 0 or 1 with data.streaming=true, found 2"),
        (
            {"select": Selection(labels_from_scores="median")},
            r"labels_from_scores: .* data.streaming=true, found median",
        ),
        ({"shuffle_buffer": 0}, r"data.shuffle_buffer: expected a whole number from 1 on, found 0"),
    ],
)
def test_what_needs_all_data_is_refused(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        StreamingDataModule(FeedbackFiles(write(tmp_path / "t.jsonl")), **options)


@pytest.mark.parametrize("name", ["a.json", "a.parquet.gz", "missing.jsonl", "a.txt"])
def test_files_that_are_read_whole_are_refused(tmp_path: Path, name: str) -> None:
    if name != "missing.jsonl":
        (tmp_path / name).write_bytes(b"[]")
    with pytest.raises(
        ValueError, match=rf"{name}: (expected a file that can be read row by row|no such|expected a name)"
    ):
        StreamingDataModule(FeedbackFiles(str(tmp_path / name)))


def test_steps_have_to_be_given(tmp_path: Path) -> None:
    made = module(write(tmp_path / "t.jsonl"))
    with pytest.raises(ValueError, match=r"trainer.max_steps: expected the number of steps .* found -1"):
        made.plan(epochs=3, max_steps=-1, accumulate=1, world_size=1)
    with pytest.raises(ValueError, match=r"not computed beforehand with data.streaming=true"):
        made.rows_read()


def test_the_longest_sequence_is_as_long_as_the_limit(tmp_path: Path) -> None:
    made = module(write(tmp_path / "t.jsonl"))
    assert made.prepared.longest() == made.preparation.limits.max_length


def test_a_prompt_over_the_limit_is_named_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"t.jsonl:1#0: expected a prompt shorter than data\.max_length = 4"):
        module(write(tmp_path / "t.jsonl"), max_length=4)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_line_ends_the_stream_with_its_place(tmp_path: Path, workers: int) -> None:
    file = write(tmp_path / "t.jsonl")
    made = planned(module(file, shuffle_buffer=1, workers=workers))
    with (tmp_path / "t.jsonl").open("a") as out:
        out.write('{"prompt": 3}\n')
    with pytest.raises(ValueError, match=rf"^{file}:31: expected"):
        ids(attach(made))
