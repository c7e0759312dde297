"""Warnings of data from which a loss learns little: pairs that are equal after truncation, and labels of one class."""

import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from halos.data.preparation.cautions import warn_of_imbalance
from halos.data.preparation.intake import Intake
from halos.data.preparation.needs import DataNeeds
from halos.data.preparation.prepare import Preparation
from halos.data.rows.chat_tokens import Limits
from halos.data.sources.feedback_files import FeedbackFiles
from halos.data.streaming.module import StreamingDataModule
from halos.reporting.data_report import FINDINGS
from tests import tiny

WORDS = "good " * 40
EQUAL_AFTER = [{"prompt": f"hello {n}", "chosen": WORDS + "a", "rejected": WORDS + "b"} for n in range(7)]
EQUAL = {"prompt": "world", "chosen": "good", "rejected": " good "}  # the template trims
DIFFERENT = [{"prompt": f"bad {n}", "chosen": "good", "rejected": "bad!"} for n in range(4)]
TRIMS = tiny.CHATML.replace("message['content']", "message['content'] | trim")


def write(folder: Path, *rows: dict[str, Any]) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def prepare(file: str, view: str, *, streaming: bool = False, **options: Any) -> Intake:
    needs, tokenizer = DataNeeds(view=view), tiny.bpe_tokenizer(TRIMS)
    source, length = FeedbackFiles(file), options.pop("max_length", 200)
    if streaming:
        return StreamingDataModule(source, max_length=length, **options).prepare(needs, tokenizer).intake
    return Preparation(source=source, limits=Limits(length), **options).prepare(needs, tokenizer).intake


def test_pairs_that_are_equal_after_truncation_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write(tmp_path, *DIFFERENT[:2], *EQUAL_AFTER, *DIFFERENT[2:], EQUAL)
    first = [f"{file}:{line}#0" for line in range(3, 8)]
    with caplog.at_level(logging.WARNING):
        intake = prepare(file, "pairs", max_length=50)
    assert f"8 of 12 pairs of train have the same tokens on both sides ({', '.join(first[:3])}, …)" in caplog.text
    assert "; 7 of them end at data.max_length=50: raise it" in caplog.text
    report: Any = intake.report()
    assert report["splits"]["train"]["equal_pairs"] == {"count": 8, "ids": first}
    assert "equal_pairs" in FINDINGS, "the table on the terminal has them"


def test_pairs_that_are_equal_anyway_are_reported_without_a_limit_to_raise(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        prepare(write(tmp_path, EQUAL, *EQUAL_AFTER), "pairs")
    assert f"1 of 8 pairs of train have the same tokens on both sides ({tmp_path}/rows.jsonl:1#0)" in caplog.text
    assert "max_length" not in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
def test_different_pairs_of_equal_length_are_not_mentioned(
    streaming: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "hello", "chosen": WORDS + "a", "rejected": "bad " + WORDS + "b"}, *DIFFERENT]
    with caplog.at_level(logging.WARNING):
        prepare(write(tmp_path, *rows), "pairs", max_length=50, streaming=streaming)
    assert not caplog.text


def test_a_stream_warns_of_its_first_pairs_and_counts_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path, *DIFFERENT, *EQUAL_AFTER)
    made = StreamingDataModule(FeedbackFiles(file), max_length=50, batch_size=11)
    with caplog.at_level(logging.WARNING):
        made.prepare(DataNeeds(view="pairs"), tiny.bpe_tokenizer(TRIMS))
    assert "7 of the first 11 pairs of the stream have the same tokens on both sides" in caplog.text
    assert "7 of them end at data.max_length=50: raise it" in caplog.text
    made.plan(epochs=None, max_steps=2, accumulate=1, world_size=1)
    made.trainer = SimpleNamespace(  # type: ignore[assignment]
        accumulate_grad_batches=1, world_size=1, global_rank=0, global_step=0
    )
    assert len(list(made.train_dataloader())) == 2
    made.take_account()
    assert made.prepared.intake.reports["train"]["pairs with the same tokens on both sides"] == 14


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([1, 1, 1], "are desirable and none is undesirable, .* or imitate these with loss=sft"),
        ([0, 0], "are undesirable and none is desirable, .* add desirable ones"),
        ([0, 1, 1], ""),
    ],
)
def test_labels_of_one_class_are_warned_of(
    labels: list[int], said: str, streaming: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": f"hello {n}", "completion": "good", "label": label} for n, label in enumerate(labels)]
    with caplog.at_level(logging.WARNING):
        prepare(write(tmp_path, *rows), "binary", streaming=streaming)
    if not said:
        assert not caplog.text
        return
    which = "the first {} completions of the stream" if streaming else "{} training completions"
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"data: all {which.format(len(labels))} are ")
    assert re.search(said, message)


def test_a_stream_refuses_before_the_run_what_its_first_examples_have_wrong(tmp_path: Path) -> None:
    rows = [*DIFFERENT, {"prompt": "hello", "chosen": "good<|im_end|>", "rejected": "bad"}]
    with pytest.raises(ValueError, match="expected texts without special tokens"):
        prepare(write(tmp_path, *rows), "pairs", streaming=True)


@pytest.mark.parametrize(
    ("loss", "counts", "said"),
    [
        ((1.0, 1.0), (6.0, 54.0), "6 desirable and 54 undesirable training completions: loss.desirable_weight=auto"),
        ((1.0, 1.0), (4500.0, 1000.0), "4,500 desirable and 1,000 undesirable .*: loss.undesirable_weight=auto"),
        ((1.0, 5.0), (10.0, 10.0), "10 desirable and 10 undesirable .*: loss.desirable_weight=auto"),
        ((9.0, 1.0), (6.0, 54.0), None),
        ((1.0, 1.0), (10.0, 40.0), None),
        (("auto", 1.0), (6.0, 54.0), None),
        ((1.0, 1.0), (0.0, 54.0), None),  # all of one class, of which another warning speaks
        ((0.0, 1.0), (6.0, 54.0), None),  # left out on purpose
        ((None, None), (6.0, 54.0), None),
        ((1.0, 1.0), None, None),
    ],
)
def test_classes_of_very_different_weight_get_a_hint(
    loss: tuple[Any, Any], counts: tuple[float, float] | None, said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_imbalance(dict(zip(("desirable_weight", "undesirable_weight"), loss, strict=True)), counts)
    assert len(caplog.messages) == (said is not None)
    assert said is None or re.match(f"data: {said} balances their weights", caplog.messages[0])
