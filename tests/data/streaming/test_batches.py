"""Micro-batches of a stream: those of the file's rows, whichever way they are divided and wherever they start."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from halos.data.batches.batch import Batch
from halos.data.batches.collate import collate, step_size
from halos.data.batches.order import Division
from halos.data.rows.chat_tokens import ChatTokens, Limits
from halos.data.rows.tokenise import make_rows
from halos.data.sources.feedback_files import FeedbackFiles
from halos.data.streaming import batches as stream_batches
from halos.data.streaming.batches import StreamBatches, StreamRows
from halos.data.streaming.examples import Counted
from halos.data.views.derive import binary
from tests import tiny
from tests.data.streaming.streams import stream_of

TOKENS = ChatTokens(tiny.word_tokenizer(tiny.CHATML), Limits(40, 12))
COUNT = 24


def feedback(folder: Path) -> Path:
    """Labelled completions, two to a prompt, of which some are too long."""
    file = folder / "f.jsonl"
    rows = [
        {
            "prompt": " ".join(["hello", *"abcd"[: 1 + n // 2 % 4], *["world"] * (n // 2 % 9)]),
            "completion": " ".join(["good"] * (1 + 7 * n % 40)),
            "label": n % 2,
        }
        for n in range(COUNT)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def batches(file: Path, *, start: int = 0, buffer: int = 1, mismatched: bool = True, **layout: Any) -> list[Batch]:
    stream = stream_of(FeedbackFiles(file), shuffle_buffer=buffer, mismatched=mismatched)
    rows = StreamRows(stream, TOKENS)
    made = StreamBatches(rows, Division(**layout), partial(collate, mismatched=mismatched, chunks=2, packing=True))
    made.start = start
    return [batch for batch, _ in made]  # type: ignore[misc]


def same(one: Any, other: Any) -> None:
    """Equal to the bit, but for the numbers of groups."""
    assert one.ids == other.ids
    assert (one.step.examples, one.step.tokens) == (other.step.examples, other.step.tokens)
    for name in ("mask", "desirable"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    for mine, theirs in zip(one.chunks, other.chunks, strict=True):
        for name in ("input_ids", "predicts", "targets", "slots"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name)), name


def test_without_shuffling_batches_are_those_of_the_files_rows(tmp_path: Path) -> None:
    file = feedback(tmp_path)
    examples = list(binary(FeedbackFiles(file).train().records).examples)
    rows = list(make_rows(examples, TOKENS).table)
    # Two to a prompt: the mismatched completion is the same one of the next prompt, cut to this one's room.
    whole = [TOKENS.completion(example.completion, example.prompt) for example in examples]
    expected = []
    for n, row in enumerate(rows[: COUNT - 2]):
        room = 40 - len(row.prompt)
        expected.append(
            type(row)(row.id, row.group, row.prompt, (*row.branches, tuple(whole[n + 2][:room])), row.desirable)
        )
    found = batches(file, batch_size=4, steps=5)
    for batch, start in zip(found, range(0, 20, 4), strict=True):
        part = expected[start : start + 4]
        same(batch, collate(part, step=step_size(part), mismatched=True, chunks=2, packing=True))
    assert batches(file, batch_size=4, steps=5, mismatched=False)[0].mask.shape[1] == 1


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "world_size"), [(6, 1, 1), (3, 1, 2), (3, 2, 1), (1, 3, 2), (2, 1, 3)]
)
def test_a_step_is_the_same_whichever_way_it_is_divided(
    tmp_path: Path, batch_size: int, accumulate: int, world_size: int
) -> None:
    file = feedback(tmp_path)
    whole = batches(file, batch_size=6, steps=7, buffer=10)
    layout: dict[str, Any] = {"batch_size": batch_size, "accumulate": accumulate, "world_size": world_size, "steps": 7}
    ranks = [batches(file, buffer=10, rank=rank, **layout) for rank in range(world_size)]
    for step, expected in enumerate(whole):
        parts = [ranks[rank][step * accumulate + m] for m in range(accumulate) for rank in range(world_size)]
        assert [name for part in parts for name in part.ids] == list(expected.ids)
        assert all(part.step == expected.step for part in parts)


@pytest.mark.parametrize("start", [0, 1, 2, 5, 11])
def test_batches_begin_anywhere(tmp_path: Path, start: int) -> None:
    file = feedback(tmp_path)
    layout: dict[str, Any] = {"batch_size": 3, "accumulate": 2, "steps": 7, "buffer": 10}
    whole = batches(file, **layout)
    assert len(whole) == 14 > COUNT // 3, "more than one pass"
    rest = batches(file, start=start, **layout)
    assert len(rest) == 14 - start
    for one, other in zip(rest, whole[start:], strict=True):
        same(one, other)
        assert torch.equal(one.group, other.group)


def test_what_was_used_is_counted_once_a_step(tmp_path: Path) -> None:
    file = feedback(tmp_path)
    stream = stream_of(FeedbackFiles(file), shuffle_buffer=1)
    rows = StreamRows(stream, TOKENS)
    totals, counts = [0], [0]
    for batch, counted in StreamBatches(rows, Division(batch_size=2, accumulate=2, steps=6)):
        totals.append(totals[-1] + batch.total_tokens)
        counts.append(counted.used["tokens"])
    assert counts[2::2] == totals[2::2]
    materialised = make_rows(list(binary(FeedbackFiles(file).train().records).examples), TOKENS).report
    assert counted.used["completions truncated"] == materialised["completions truncated"] > 0
    assert counted.used["prompts truncated"] == materialised["prompts truncated"] > 0


def test_groups_know_how_many_were_drawn_together(tmp_path: Path) -> None:
    file = tmp_path / "s.jsonl"
    rows = [{"prompt": f"hello {'a ' * (n // 3)}", "completion": "good", "score": n} for n in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stream = stream_of(FeedbackFiles(file), "scored", shuffle_buffer=1, grouped=True)
    made = StreamBatches(StreamRows(stream, TOKENS), Division(batch_size=4, steps=3))
    for batch, _ in made:
        assert batch.step.members == (3, 3, 3, 3)
    assert isinstance(next(iter(made))[1], Counted)


def test_what_a_worker_counted_up_to_a_batch_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = stream_of(FeedbackFiles(feedback(tmp_path)), shuffle_buffer=1)
    made = StreamBatches(StreamRows(stream, TOKENS), Division(batch_size=2, steps=6))
    alone = [(counted.used["tokens"], counted.read["examples"]) for _, counted in made]
    monkeypatch.setattr(stream_batches, "get_worker_info", object)
    later = [(counted.used["tokens"], counted.read["examples"]) for _, counted in list(made)]
    assert later == alone
    assert len(set(alone)) == 6
